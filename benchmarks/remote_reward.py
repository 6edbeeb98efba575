"""How much faster is a slow scoring service with several requests in flight than with one?

    python -m benchmarks.remote_reward --latency 1 --in-flight 8 --requests 16

A server on this machine answers every request after a fixed time, as a large reward model does. The same batch is
scored with one request at a time and with several, in one run; the ratio of the two is what is reported. It is
`in-flight` less what encoding and transfer take; the CPU seconds of client and server, printed beside the times, tell
that from a machine that is busy with something else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import torch
import uvicorn
from fastapi import FastAPI, Request

from flow_rl.rewards import Samples
from flow_rl.rewards.asking import ask
from flow_rl.rewards.endpoint import EndpointSettings
from flow_rl.rewards.remote import RemoteReward
from flow_rl.rewards.wire import ScoreRequest, ScoreResponse


@contextlib.contextmanager
def delayed_service(latency_s: float) -> Iterator[str]:
    app = FastAPI()

    @app.post("/score")
    async def score(request: Request) -> dict:
        message = ScoreRequest.model_validate_json(await request.body())
        await asyncio.sleep(latency_s)
        return ScoreResponse(reward=message.reward, scores=[3.0] * len(message.images)).model_dump()

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def seconds(url: str, samples: Samples, *, in_flight: int, samples_per_request: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    connection = EndpointSettings(max_in_flight=in_flight, retries=0)
    reward = RemoteReward(url, "delayed", samples_per_request=samples_per_request, connection=connection)
    start, cpu = time.perf_counter(), time.process_time()
    scores = ask(reward, samples, "delayed", section=None)
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert scores.eq(3.0).all()
    reward.close()
    return spent, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds the service takes for a request")
    parser.add_argument("--in-flight", type=int, default=8, help="requests at a time")
    parser.add_argument("--requests", type=int, default=16, help="requests that the batch is split into")
    parser.add_argument("--samples-per-request", type=int, default=2)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = options.requests * options.samples_per_request
    images = torch.rand(count, 3, options.size, options.size)
    samples = Samples(images=images, prompts=["a red pot"] * count, categories=["plant"] * count)
    with delayed_service(options.latency) as url:
        times = {
            n: seconds(url, samples, in_flight=n, samples_per_request=options.samples_per_request)
            for n in (1, options.in_flight)
        }
    for n, (spent, cpu) in times.items():
        print(f"{n:3d} in flight: {spent:7.2f} s, {count / spent:6.2f} images/s, {cpu:5.2f} s of CPU")
    print(f"ratio: {times[1][0] / times[options.in_flight][0]:.2f}")


if __name__ == "__main__":
    main()
