"""Ways to compute the rows of work items: in this process, in processes that may die, on a cluster."""
