"""The catalogue and price list, pushed whole to every caller when either changes."""

from collections.abc import Callable

from gpumesh.common.v1 import job_pb2
from gpumesh.common.v1.link_pb2 import ItemKind
from gpumesh.router.v1 import admission_service_pb2 as admission_pb2
from gpumesh_router.domain.catalogue import Catalogue
from gpumesh_router.wire import price_to_wire
from gpumesh_runtime.link import Link


class CataloguePublisher:
    """Keeps the encoded catalogue and the links that want it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._models: list[job_pb2.Model] = []
        self.on_change: Callable[[admission_pb2.Catalogue], None] | None = None  # this process's own copy
        self._links: set[Link] = set()

    @property
    def models(self) -> list[job_pb2.Model]:
        """The models as the registry sent them."""
        return self._models

    def add(self, link: Link) -> None:
        """A caller connected."""
        self._links.add(link)
        if self._catalogue.ready:
            link.send_new(ItemKind.ITEM_KIND_UPDATE, body=self.encoded())

    def remove(self, link: Link) -> None:
        """A caller left."""
        self._links.discard(link)

    def replace_models(self, models: list[job_pb2.Model]) -> None:
        """The registry sent a new catalogue."""
        self._models = models
        self.publish()

    def publish(self) -> None:
        """Something changed: everyone gets the whole again. Repetition is harmless."""
        if not self._catalogue.ready:
            return
        if self.on_change is not None:
            self.on_change(self.wire())
        body = self.encoded()
        for link in self._links:
            if link.end is None:
                link.send_new(ItemKind.ITEM_KIND_UPDATE, body=body)

    def wire(self) -> admission_pb2.Catalogue:
        """Models and prices."""
        prices = {model_id: price_to_wire(price) for model_id, price in self._catalogue.prices.items()}
        return admission_pb2.Catalogue(models=self._models, prices=prices)

    def encoded(self) -> bytes:
        """The body of an Update."""
        return self.wire().SerializeToString()
