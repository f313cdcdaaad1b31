"""`script/fleet`. Ray reads its authentication from the environment when it is imported, so that is set here first."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from pathlib import Path

from cluster.child import PROJECT


def main() -> None:
    """Make a token that only this user can read, then start the fleet."""
    with tempfile.TemporaryDirectory(prefix="flux-fleet-", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_SERVE_LOG_TO_STDERR="0",
            RAY_SERVE_ROUTER_RETRY_MAX_BACKOFF_S="0.1",  # how long a free seat may stay unseen; 0.5 by default
            RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",  # 5 by default: too short for a busy machine
            RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
            PYTHONPATH=str(PROJECT),
        )
        from cluster.app import run

        status = run(Path(folder))
    sys.exit(status)


if __name__ == "__main__":
    main()
