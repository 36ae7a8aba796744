"""Training: the loop, its optimizer, and what is fixed at a job's first start."""
