"""Bundles on another machine: it is reached by a transport, and does there what this edgetube does here.

`transport` says what a transport is, and knows them by the scheme of an address: `ssh` and `adb`, each by a `client` of
this machine. `portable` makes a Python for a device that has none. `stage` is the first program there, `store` what is
sent to it, `bootstrap` the environment that edgetube runs in, and `far` edgetube there. `device` is the other machine
as this one sees it, and `backend` an artifact that is opened on it.
"""
