"""`pgauthproxy` and `python -m pgauthproxy`: one command."""

import signal


def main() -> None:
    # Ctrl-C while modules are loaded ends the process without a traceback; what runs then has handlers of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pgauthproxy.cli import main as run

    run()


if __name__ == "__main__":
    main()
