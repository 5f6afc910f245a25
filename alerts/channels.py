"""From one integration of the rules to its open channel. It knows which class speaks to whom, and nothing else."""

from __future__ import annotations

from alerts.alertmanager import AlertmanagerChannel
from alerts.channel import Channel
from alerts.config import (
    AlertmanagerConfig,
    AlertsConfig,
    AnyIntegration,
    EmailConfig,
    LogConfig,
    PagerDutyConfig,
    SlackConfig,
    WebhookConfig,
)
from alerts.email import EmailChannel
from alerts.jsonl import LogChannel
from alerts.pagerduty import PagerDutyChannel
from alerts.slack import SlackChannel
from alerts.webhook import WebhookChannel

__all__ = ["open_channel"]


def open_channel(integration: AnyIntegration, config: AlertsConfig) -> Channel:
    """The channel of one integration; `config` has the links that its messages carry. Connects to nobody yet.

    Raises:
        ConfigurationError: the log integration's file can't be written.
    """
    match integration:
        case WebhookConfig():
            return WebhookChannel(integration, config)
        case AlertmanagerConfig():
            return AlertmanagerChannel(integration, config)
        case PagerDutyConfig():
            return PagerDutyChannel(integration, config)
        case SlackConfig():
            return SlackChannel(integration, config)
        case EmailConfig():
            return EmailChannel(integration, config)
        case LogConfig():
            channel = LogChannel(integration, config)
            channel.check()
            return channel
