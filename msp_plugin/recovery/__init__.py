"""Recovery: change the surviving weights of a sparse model so that it comes nearer to the dense one."""
