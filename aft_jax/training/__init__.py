"""Training: the state, pure steps, the one loop, the mesh, checkpoints and metric writers."""
