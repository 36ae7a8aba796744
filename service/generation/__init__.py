"""Generation: admission in the API's process, and the engine process that computes."""
