"""HTTP: from a request's bytes to a response's. The only home of FastAPI, Starlette and uvicorn."""
