"""The engine behind HTTP: one process, one engine, one run folder. Started by `fdfo serve`; see docs/BACKEND.md."""
