"""How good a seat is for a job: less is better. The full cost model (ttft, price, reliability) comes as further functions here."""

from gpumesh_scheduler.domain.choice.filters import SeatView


def outstanding(seat: SeatView) -> tuple[int, int]:
    """Least outstanding tokens, then most free slots. Work under way is counted here, never scraped: scraped load herds."""
    return (seat.outstanding_tokens, seat.used - seat.model.slots)
