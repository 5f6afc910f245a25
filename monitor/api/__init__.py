"""The service's HTTP interface. The only place, with `monitor.serving`, that knows FastAPI and uvicorn."""
