"""The faces of the server, one file each: endpoints over the one queue."""
