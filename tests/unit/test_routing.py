from dflash_serve.routing import IN_FLIGHT, REPORT_NUMBER, LoadBook


def stats(number: int, in_flight: int) -> dict[str, int]:
    return {REPORT_NUMBER: number, IN_FLIGHT: in_flight}


def test_what_was_sent_counts_until_the_next_report() -> None:
    book = LoadBook[str]()
    book.report("a", stats(0, 3))
    book.sent("a")
    book.sent("a")
    assert book.load("a") == 5
    book.report("a", stats(0, 3))  # the same report, seen again with the next request
    assert book.load("a") == 5
    book.report("a", stats(1, 4))
    assert book.load("a") == 4


def test_a_replica_that_never_reported_counts_what_was_sent() -> None:
    book = LoadBook[str]()
    book.report("new", {})
    book.sent("new")
    assert book.load("new") == 1
    assert book.load("unheard of") == 0


def test_gone_replicas_are_forgotten() -> None:
    book = LoadBook[str]()
    book.sent("a")
    book.sent("b")
    book.keep_only({"b"})
    assert book.load("a") == 0
    assert book.load("b") == 1


def test_requests_spread_over_replicas_of_unequal_load() -> None:
    book = LoadBook[str]()
    book.report("busy", stats(0, 6))
    book.report("idle", stats(0, 0))
    sent = []
    for _ in range(10):
        target = min(("busy", "idle"), key=book.load)
        book.sent(target)
        sent.append(target)
    assert sent.count("idle") == 8
    assert sent.count("busy") == 2
