import threading

from edgetube.live.frame import Account, Ledger


def test_the_account_balances_at_every_moment() -> None:
    ledger, stop, wrong = Ledger(), threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            found = ledger.account()
            if found.captured != found.used + found.waiting + sum(found.dropped.values()) or found.waiting < 0:
                wrong.append(found)

    watching = threading.Thread(target=look)
    watching.start()
    for number in range(3000):
        assert ledger.capture() == number
        if number % 3 == 0:
            ledger.drop("overrun")
        else:
            ledger.use()
        if number % 10 == 1:
            ledger.drop("restart", used=True)
    stop.set()
    watching.join()
    assert not wrong
    assert ledger.account() == Account(3000, 1700, 0, {"overrun": 1000, "restart": 300})
