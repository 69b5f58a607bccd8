"""The OpenAI-compatible server. `build` makes an engine from a model and an adapter, `app` puts HTTP in front of it."""
