"""How fast training is: steps beside other implementations and their limit, evaluation's share, and how time grows."""
