"""How far the output of one node of a network moves, given how far its inputs moved; one file per kind of node."""
