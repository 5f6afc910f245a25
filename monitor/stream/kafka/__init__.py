"""Kafka as a `Log`, a worker's share of one of its topics, and its topics. The only package that imports kafka-python.

It knows nothing of what records mean. Three habits of that library shape it. A producer bounds neither its memory nor
its waiting, so an append that has failed throws its producer away, and the caller appends again. A consumer that can't
reach its broker just returns nothing, so silence is looked into. And a client that fails while it connects leaves its
thread behind and calls a wrong password a timeout, so every client is made in one place, which shakes hands first.
"""

from __future__ import annotations

from monitor.stream.kafka.admin import KafkaTopics
from monitor.stream.kafka.log import KafkaLog
from monitor.stream.kafka.subscription import KafkaSubscription
from monitor.stream.options import KafkaOptions

__all__ = ["KafkaLog", "KafkaOptions", "KafkaSubscription", "KafkaTopics"]
