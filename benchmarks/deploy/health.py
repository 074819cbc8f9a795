"""Ask one of Flower's processes whether it is healthy: ``python -m benchmarks.deploy.health 127.0.0.1:9099``; the status is the answer."""

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub


def healthy(address: str, seconds: float = 5.0) -> bool:
    """Whether the health server at ``address`` answers that it serves."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if healthy(sys.argv[1]) else 1)
