"""Jobs, sweeps and comparisons as HTML with static SVG: for notebooks, and as one file that opens offline."""
