"""Models in processes of their own: the engine sends each a step as bytes, and gets its outcome as bytes."""
