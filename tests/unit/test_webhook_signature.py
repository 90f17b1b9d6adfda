"""Signatures as in the Standard Webhooks specification."""

from __future__ import annotations

import base64
import json
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from jobs.webhooks.signature import headers, new_secret


def test_the_vector_of_the_specification() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    found = headers(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_new_secret_signs_what_the_library_verifies() -> None:
    secret = new_secret()
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    body = json.dumps({"text": "你好"}).encode()
    signed = headers(secret, "evt_1", int(time.time()), body)
    assert Webhook(secret).verify(body, signed) == {"text": "你好"}
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(body, signed)
