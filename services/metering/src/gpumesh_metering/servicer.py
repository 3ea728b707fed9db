"""Metering's RPCs: one short method each."""

from typing import Any, Final

from gpumesh.metering.v1 import balance_service_pb2 as balance
from gpumesh.metering.v1 import ledger_service_pb2 as ledger
from gpumesh.metering.v1 import settlement_service_pb2 as settlement
from gpumesh.metering.v1.balance_service_pb2_grpc import BalanceServiceServicer
from gpumesh.metering.v1.ledger_service_pb2_grpc import LedgerServiceServicer
from gpumesh.metering.v1.settlement_service_pb2_grpc import SettlementServiceServicer
from gpumesh_metering import wire
from gpumesh_metering.balances import BalanceHub
from gpumesh_metering.limits import check_credit, check_owner, check_price, check_usage
from gpumesh_metering.settlements import SettlementReceiver
from gpumesh_metering.store import LedgerStore, StoreRefusedError
from gpumesh_runtime.errors import InvalidArgument, Reason
from gpumesh_runtime.identity import Identity, peer_identity
from gpumesh_runtime.link import LinkServer

_DEFAULT_PAGE: Final = 100


class SettlementServicer(SettlementServiceServicer):
    """SettlementService: a link per scheduler."""

    def __init__(self, receiver: SettlementReceiver, instance: str) -> None:
        def welcome(hello: bytes, peer: Identity) -> bytes:
            settlement.SettlementHello.FromString(hello)
            return settlement.SettlementWelcome(metering_id=instance).SerializeToString()

        self.links = LinkServer(receiver, welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # grpc.aio takes a coroutine too
        """Serves one scheduler's link until it ends."""
        await self.links.serve(request_iterator, context)


class BalanceServicer(BalanceServiceServicer):
    """BalanceService: a link per router."""

    def __init__(self, hub: BalanceHub, instance: str) -> None:
        def welcome(hello: bytes, peer: Identity) -> bytes:
            balance.BalanceHello.FromString(hello)
            return balance.BalanceWelcome(metering_id=instance).SerializeToString()

        self.links = LinkServer(hub, welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # grpc.aio takes a coroutine too
        """Serves one router's link until it ends."""
        await self.links.serve(request_iterator, context)


class LedgerServicer(LedgerServiceServicer):
    """LedgerService, for operators. Errors of the store leave as they are: Unavailable, AlreadyExists."""

    def __init__(self, store: LedgerStore, hub: BalanceHub) -> None:
        self._store = store
        self._hub = hub

    async def Credit(self, request: ledger.CreditRequest, context: Any) -> ledger.CreditResponse:
        """Credits an account, once per credit id."""
        check_credit(request)
        try:
            row = await self._store.credit(
                request.credit_id,
                request.account_id,
                request.amount_nano_usd,
                request.memo,
                peer_identity(context).name,
            )
        except StoreRefusedError as err:
            raise InvalidArgument(Reason.INVALID_ARGUMENT, "The account cannot hold that much.") from err
        self._hub.changed([row])
        return ledger.CreditResponse(balance=ledger.CreditResponse.Balance(available_nano_usd=row.available))

    async def GetBalances(self, request: ledger.GetBalancesRequest, context: Any) -> ledger.GetBalancesResponse:
        """Balances of one owner."""
        check_owner(request.owner_id)
        return ledger.GetBalancesResponse(balances_nano_usd=await self._store.owner_balances(request.owner_id))

    async def SetPrice(self, request: ledger.SetPriceRequest, context: Any) -> ledger.SetPriceResponse:
        """Publishes a model's price and tells the routers."""
        check_price(request)
        price = await self._store.set_price(
            request.model_id,
            request.input_nano_usd_per_mtok,
            request.output_nano_usd_per_mtok,
            peer_identity(context).name,
        )
        self._hub.set_prices(await self._store.prices())
        return ledger.SetPriceResponse(price=wire.price_to_wire(price))

    async def ListUsage(self, request: ledger.ListUsageRequest, context: Any) -> ledger.ListUsageResponse:
        """One page of settled jobs."""
        before = check_usage(request)
        size = request.page_size or _DEFAULT_PAGE
        rows = await self._store.usage(request.account_id, request.job_id, before, size + 1)
        page = rows[:size]
        more = len(rows) > size
        return ledger.ListUsageResponse(
            rows=map(wire.usage_row_to_wire, page), next_page_token=wire.page_token(page[-1].number) if more else ""
        )

    async def CheckLedger(self, request: ledger.CheckLedgerRequest, context: Any) -> ledger.CheckLedgerResponse:
        """Verifies the invariants."""
        result = await self._store.check()
        return ledger.CheckLedgerResponse(
            violations=result.violations, transfers=result.transfers, settlements=result.settlements
        )
