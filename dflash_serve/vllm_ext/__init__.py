"""What we add to vLLM, through its own extension points."""
