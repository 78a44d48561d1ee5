"""`make gpu-check`: what holds on the card of this machine, and what it costs there."""
