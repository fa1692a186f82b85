"""From the configuration to the models of step 1: who extracts, who verifies, what it may cost."""

from fgaif.chat.cached import CachedChat
from fgaif.chat.endpoint import Endpoint
from fgaif.chat.limits import Budget, Usage, price
from fgaif.chat.messages import ChatModel
from fgaif.chat.store import ReplyStore
from fgaif.config import API, Config
from fgaif.errors import ConfigError
from fgaif.feedback.annotate import Annotator
from fgaif.feedback.extract import ModelFacts, asks_in_text, load_facts_prompt
from fgaif.feedback.facts import FactExtractor, FactVerifier, SceneFacts, WholeSegments
from fgaif.feedback.verify import VerifierPanel, YesNoVerifier, kind_prompts, load_fact_prompt


def check_prompts(config: Config) -> None:
    """See before anything is sampled that every kind can be asked for.

    Raises:
        ConfigError: a prompt or a kind's description is missing, or the extractor states no facts
            of a kind.
    """
    feedback = config.feedback
    if feedback.extractor == "scenes":
        SceneFacts(config.kind_names)
    elif feedback.extractor != "segment":
        for text_form in {True, asks_in_text(config)}:  # the plain text also after unreadable JSON
            load_facts_prompt(
                config.kinds,
                feedback.extract_per,
                folder=feedback.prompts_dir,
                text_form=text_form,
            )
    load_fact_prompt(feedback.prompt)
    kind_prompts(config.kinds)


class FeedbackModels:
    """The chat models that a run's feedback section names, behind one reply store and one budget.

    ``local`` answers for the verifier checkpoint, which runs on our own actors.
    """

    def __init__(self, config: Config, store: ReplyStore, local: ChatModel | None) -> None:
        self._config = config
        self._store = store
        self._local = local
        self._budget = Budget(config.feedback.max_cost, config.feedback.max_tokens)
        self._chats: dict[str, CachedChat] = {}

    def annotator(self) -> Annotator:
        """Extractor and verifiers as configured."""
        config = self._config
        return Annotator(
            self.extractor(), self.verifier(), config.segment.least_words, config.kind_names
        )

    def extractor(self) -> FactExtractor:
        """Who states the atomic facts."""
        feedback = self._config.feedback
        if feedback.extractor == "scenes":
            return SceneFacts(self._config.kind_names)
        if feedback.extractor == "segment":
            return WholeSegments(self._config.kind_names)
        name = feedback.local_verifier if feedback.extractor == "model" else feedback.extractor
        assert name is not None, "checked with the configuration"
        return ModelFacts(
            self._chat(name),
            per=feedback.extract_per,
            prompts_dir=feedback.prompts_dir,
            text_form=asks_in_text(self._config),
            max_facts=feedback.max_facts,
            reads=feedback.reads,
            kinds=self._config.kinds,
        )

    def verifier(self) -> FactVerifier:
        """Who checks them; several vote."""
        feedback = self._config.feedback
        prompt = load_fact_prompt(feedback.prompt)
        own = kind_prompts(self._config.kinds)
        members = [
            YesNoVerifier(
                self._chat(name), prompt, own, abstain=feedback.abstain, reads=feedback.reads
            )
            for name in feedback.verifiers
        ]
        return members[0] if len(members) == 1 else VerifierPanel(members)

    def usage(self) -> Usage:
        """Requests, tokens and money of this process so far."""
        return self._budget.usage()

    def _chat(self, name: str) -> CachedChat:
        if name not in self._chats:
            self._chats[name] = CachedChat(self._open(name), self._store)
        return self._chats[name]

    def _open(self, name: str) -> ChatModel:
        if name.startswith(API):
            entry = name.removeprefix(API)
            settings = self._config.endpoints[entry]
            pixels = self._config.data.max_image_pixels
            endpoint = Endpoint(entry, settings, self._budget, max_image_pixels=pixels)
            # What earlier runs of this job paid counts towards its budget.
            self._budget.charge(price(settings, *self._store.tokens(endpoint.name)))
            return endpoint
        if self._local is None:
            raise ConfigError(f"feedback.verifier = {name!r}: its engine was not started")
        return self._local
