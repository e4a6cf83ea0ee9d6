"""Figures for Prometheus: what was answered, counted as it ends, and what the swarm is at, looked up when asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from skynet.coordinator.engine import Engine
from skynet.coordinator.gateway.desk import Answered

SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics(Collector):
    """One registry of our own, so that several gateways in one process don't share figures."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        own = self._registry
        self._requests = Counter("skynet_http_requests", "Answered requests.", ["path", "status"], registry=own)
        self._prompt = Counter("skynet_prompt_tokens", "Tokens of prompts of answered requests.", registry=own)
        self._completion = Counter("skynet_completion_tokens", "Tokens of whole answers.", registry=own)
        self._first = Histogram(
            "skynet_first_token_seconds", "From the request to its first token.", buckets=SECONDS, registry=own
        )
        self._whole = Histogram(
            "skynet_request_seconds", "From the request to the end of its answer.", buckets=SECONDS, registry=own
        )
        own.register(self)

    def answered(self, answered: Answered) -> None:
        """A request has ended."""
        self._requests.labels(answered.path, str(answered.status)).inc()
        self._prompt.inc(answered.prompt_tokens)
        self._completion.inc(answered.completion_tokens)
        if answered.first_s is not None:
            self._first.observe(answered.first_s)
            self._whole.observe(answered.total_s)

    def collect(self) -> Iterator[Metric]:
        """What the swarm is at now."""
        engine = self._engine
        yield GaugeMetricFamily("skynet_requests", "Requests in progress, of all clients.", engine.num_requests)
        yield GaugeMetricFamily("skynet_queued", "Sequences that no replica can run now.", engine.num_queued)
        used = GaugeMetricFamily("skynet_kv_blocks_used", "KV blocks in use.", labels=["replica"])
        there = GaugeMetricFamily("skynet_kv_blocks", "KV blocks there are.", labels=["replica"])
        sequences = GaugeMetricFamily("skynet_sequences", "Sequences of a replica.", labels=["replica"])
        for replica in engine.replicas:
            name, blocks = str(replica.epoch), replica.scheduler.blocks
            used.add_metric([name], blocks.num_blocks - blocks.num_free)
            there.add_metric([name], blocks.num_blocks)
            sequences.add_metric([name], replica.scheduler.num_sequences)
        memory = GaugeMetricFamily("skynet_worker_memory_bytes", "Memory that a worker uses.", labels=["worker"])
        steps = GaugeMetricFamily(
            "skynet_worker_steps", "Steps that a worker has done since it joined.", labels=["worker"]
        )
        for worker_id, member in engine.membership.members.items():
            memory.add_metric([worker_id], member.memory_used_bytes)
            steps.add_metric([worker_id], member.steps_done)
        yield from (used, there, sequences, memory, steps)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

    def routes(self) -> APIRouter:
        """`/metrics`."""
        router = APIRouter()

        @router.get("/metrics", response_model=None)
        async def metrics() -> Response:
            return Response(self.text(), headers={"content-type": CONTENT_TYPE_LATEST})

        return router
