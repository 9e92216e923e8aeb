"""HTTP API of the server: the routes of OpenAI's API, nanochat's route, health and metrics."""
