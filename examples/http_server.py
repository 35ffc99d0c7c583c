"""An HTTP endpoint over Starlette and uvicorn (pip install starlette uvicorn). An example, not a feature of nanovllm.

    python -m examples.http_server [--model MODEL] [--port PORT]
    curl -N http://127.0.0.1:8000/generate -d '{"prompt": "In the beginning", "max_tokens": 40}'

Each request runs in a thread of its own and its text is streamed; the engine computes the requests of all threads
together. After the response, or when the client has disconnected, the iterator is closed, which aborts its request.
"""

import argparse
import json

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanovllm import LLM, SamplingParams, bundled_model_path


def make_app(llm: LLM) -> Starlette:
    async def generate(request: Request) -> Response:
        try:
            options = json.loads(await request.body())
            if not isinstance(options, dict) or not isinstance(prompt := options.pop("prompt", None), str):
                raise ValueError('the body must be a JSON object with a string "prompt"')
            pieces = llm.generate_stream(prompt, SamplingParams(**options))  # checks them, and computes nothing yet
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        # Starlette takes the next item of an ordinary generator in a thread, so the event loop stays free.
        texts = (piece["text"] for piece in pieces)
        return StreamingResponse(texts, media_type="text/plain", background=BackgroundTask(pieces.close))

    return Starlette(routes=[Route("/generate", generate, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate over HTTP.")
    parser.add_argument("--model", default=str(bundled_model_path()))
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with LLM(arguments.model) as llm:
        uvicorn.run(make_app(llm), host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
