"""The round: a pure state machine that decides, and an engine that carries its decisions out."""
