"""Ready experiments: each is the body of a `POST /sweeps`, what to compare, and what to look at.

The reference run and its twin, five questions about a dense model, three about a mixture of experts. Each takes less
than two minutes on two cores. Knows no HTTP.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

PARAGRAPH = files("nanomoe").joinpath("assets", "paragraph.pt.txt").read_text(encoding="utf-8").strip()
"""The example text."""

_TWO_MORE = (
    "Na semana seguinte a menina foi à feira com o vidro vazio debaixo do braço. Pediu ao peixeiro uma palavra com "
    "cheiro de sal, ao padeiro uma que estalasse, à costureira uma comprida, que desse para a barra de uma saia. "
    "Ninguém quis dinheiro: cada um soprou a sua lá dentro, depressa, e fechou a tampa com a palma da mão.\n\n"
    "De noite, na cozinha, a avó encostou o ouvido no vidro e ouviu a feira inteira. Riu sozinha, apagou a luz e "
    "deixou a tampa aberta. De manhã as palavras tinham ido para a rua, e quem passava respondia bom dia sem saber "
    "por quê. O vidro ficou na janela, cheio só de sol, à espera da próxima chuva.\n"
)

LONG_TEXT = f"{PARAGRAPH}\n\n{_TWO_MORE}".strip()
"""The example text gone on: three times as long."""

MIXTURE = {"use_moe": True, "tokenizer": "bytes", "n_embd": 64, "epochs": 100, "lr": 1e-3}
"""A small mixture of experts over bytes: enough tokens for its experts to share, and quick to train."""


@dataclass(frozen=True)
class Preset:
    """An experiment that is ready to be submitted."""

    name: str
    look_at: Mapping[str, str]
    """The question, and what to look at in the result: `en` and `pt`."""

    sweep: Mapping[str, Any]
    """The body of `POST /sweeps`, but for name and text."""

    metrics: tuple[str, ...] = ("loss", "perplexity", "accuracy", "tok_per_sec")
    """Metrics that answer the question, for `GET /compare`."""

    perplexity: float | None = None
    """Perplexity for which the comparison says when each job came to it."""

    text: str = field(default=PARAGRAPH, repr=False)

    def request(self) -> dict[str, Any]:
        """The complete body of `POST /sweeps`."""
        return {"text": self.text, "name": self.name, **self.sweep}


PRESETS = (
    Preset(
        "reference",
        {
            "en": "Watch the loss fall from ln V to 0.4: after 500 passes the model knows the text by heart.",
            "pt": "Veja a perda cair de ln V até 0,4: depois de 500 passagens o modelo sabe o parágrafo de cor.",
        },
        {"points": [{}], "seeds": 3},
    ),
    Preset(
        "mixture",
        {
            "en": "Compare the reference run with its twin whose every other MLP is a mixture of eight experts: more "
            "parameters, some more of them at work for each token, and what that buys in perplexity and costs in "
            "speed.",
            "pt": "Compare a execução de referência com a gêmea em que um MLP sim, outro não é uma mistura de oito "
            "especialistas: mais parâmetros, alguns a mais em uso por token, e quanto isso rende em perplexidade e "
            "custa em velocidade.",
        },
        {"config": {"epochs": 60, "lr": 1e-3}, "points": [{"use_moe": False}, {"use_moe": True}], "seeds": 3},
        ("loss", "perplexity", "moe.load_cv", "tok_per_sec"),
    ),
    Preset(
        "capacity",
        {
            "en": "How much capacity does the text need? A wider model needs fewer passes to come below perplexity 2, "
            "but each pass takes longer: compare steps and seconds.",
            "pt": "De quanta capacidade o texto precisa? Um modelo mais largo precisa de menos passagens para chegar "
            "a uma perplexidade abaixo de 2, mas cada passagem demora mais: compare passos e segundos.",
        },
        {"config": {"stop_at_perplexity": 2.0, "lr": 1e-3}, "grid": {"n_embd": [32, 64, 128]}, "seeds": 3},
        perplexity=2.0,
    ),
    Preset(
        "dropout",
        {
            "en": "Does dropout hinder learning by heart? Without it the paragraph is memorised sooner and the loss "
            "falls smoothly: what dropout slows down is exactly learning by heart.",
            "pt": "O dropout atrapalha decorar? Sem ele o parágrafo é decorado mais cedo e a perda cai sem "
            "solavancos: o que o dropout atrasa é justamente o decorar.",
        },
        {"config": {"epochs": 60, "lr": 1e-3}, "grid": {"dropout": [0.0, 0.2]}, "seeds": 3},
    ),
    Preset(
        "prefix",
        {
            "en": "How short a prefix still recalls the text? All jobs of a seed learn the same weights; look at "
            "their continuations: from when on do three tokens suffice to recall the text?",
            "pt": "Com um começo de que tamanho o texto ainda é lembrado? Os jobs de uma mesma semente aprendem os "
            "mesmos pesos; veja as continuações: a partir de quando três tokens bastam para lembrar o texto?",
        },
        {"config": {"epochs": 80, "lr": 1e-3}, "grid": {"cont_prefix_tokens": [10, 3]}, "seeds": 3},
    ),
    Preset(
        "learning-rate",
        {
            "en": "What does a larger learning rate do? It has arrived before the smaller one has come far, but its "
            "seeds part: look at the spread and at the curves, not only at the ends.",
            "pt": "O que faz uma taxa de aprendizado maior? Ela chega antes que a menor tenha ido longe, mas as "
            "sementes se separam: veja a dispersão e as curvas, e não só o fim delas.",
        },
        {"config": {"epochs": 200}, "grid": {"lr": [1e-4, 5e-3]}, "seeds": 3},
    ),
    Preset(
        "long-text",
        {
            "en": "Three times the text with the same model, and with more layers: compare bits per byte, since there "
            "is more to remember.",
            "pt": "O triplo do texto com o mesmo modelo, e com mais camadas: compare os bits por byte, já que há mais "
            "para lembrar.",
        },
        {
            "config": {"epochs": 60, "lr": 1e-3},
            "points": [{}, {"text": LONG_TEXT}, {"text": LONG_TEXT, "n_layer": 6}],
            "seeds": 3,
        },
        ("loss", "perplexity", "bits_per_byte", "tok_per_sec"),
    ),
    Preset(
        "balance",
        {
            "en": "A stronger balance loss evens out the experts' load (`moe.load_cv` falls): from where on does it "
            "cost perplexity?",
            "pt": "Uma perda de balanceamento mais forte iguala a carga dos especialistas (`moe.load_cv` cai): a "
            "partir de onde isso custa perplexidade?",
        },
        {"config": MIXTURE, "grid": {"router_aux_loss_coef": [0.0, 0.01, 0.1, 1.0]}, "seeds": 3},
        ("perplexity", "moe.load_cv", "moe.max_violation", "moe.dead_experts"),
    ),
    Preset(
        "capacity-factor",
        {
            "en": "With a bounded capacity busy experts drop tokens, the more so the more experts share them: look at "
            "the dropped share and at the perplexity.",
            "pt": "Com capacidade limitada, especialistas ocupados descartam tokens, e tanto mais quanto mais "
            "especialistas os dividem: veja a parte descartada e a perplexidade.",
        },
        {"config": MIXTURE, "grid": {"capacity_factor": [0.5, 1.0], "n_experts": [4, 16]}, "seeds": 3},
        ("perplexity", "moe.train_dropped_fraction", "moe.load_cv"),
    ),
    Preset(
        "tokens-per-expert",
        {
            "en": "More experts mean fewer tokens for each: from where on are there experts that nobody needs?",
            "pt": "Mais especialistas significam menos tokens para cada um: a partir de onde há especialistas de que "
            "ninguém precisa?",
        },
        {"config": MIXTURE, "grid": {"n_experts": [2, 8, 32]}, "seeds": 3},
        ("perplexity", "moe.load_cv", "moe.dead_experts", "moe.router_entropy"),
    ),
)
"""Every preset, the reference run first."""
