"""From rewards to weights: advantage, deal, loss, ZeRO step."""
