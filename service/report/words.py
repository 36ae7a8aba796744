"""The words of a report, in the languages that the service speaks."""

from typing import Literal

Language = Literal["en", "pt"]
"""Languages of a report."""

WORDS: dict[str, dict[Language, str]] = {
    "comparison": {"en": "Comparison", "pt": "Comparação"},
    "sweep": {"en": "sweep", "pt": "varredura"},
    "curves": {"en": "Training loss by step", "pt": "Perda de treino por passo"},
    "band_of_seeds": {
        "en": "Line: mean over the seeds that have come so far. Band: from the lowest to the highest seed.",
        "pt": "Linha: média das sementes que já chegaram até ali. Faixa: da semente mais baixa à mais alta.",
    },
    "band_of_steps": {
        "en": "Line: middle of each stretch of steps. Band: its lowest and highest loss.",
        "pt": "Linha: meio de cada trecho de passos. Faixa: a menor e a maior perda dele.",
    },
    "over": {"en": "{metric} over {name}", "pt": "{metric} por {name}"},
    "step": {"en": "step", "pt": "passo"},
    "job": {"en": "job", "pt": "job"},
    "seeds": {"en": "n", "pt": "n"},
    "status": {"en": "status", "pt": "estado"},
    "done": {"en": "done", "pt": "feito"},
    "best": {"en": "best {metric}", "pt": "melhor {metric}"},
    "until": {"en": "steps until", "pt": "passos até"},
    "seconds_until": {"en": "seconds until", "pt": "segundos até"},
    "at_step": {"en": "train_loss at step", "pt": "train_loss no passo"},
    "newest": {"en": "Figures of each newest checkpoint", "pt": "Números de cada checkpoint mais novo"},
    "quarters": {"en": "{metric} by quarter", "pt": "{metric} por quarto"},
    "quarter": {"en": "quarter", "pt": "quarto"},
    "jobs": {"en": "{n} jobs", "pt": "{n} jobs"},
    "one_job": {"en": "1 job", "pt": "1 job"},
    "differs": {"en": "what differs: {names}", "pt": "o que difere: {names}"},
    "spread": {
        "en": "Where n is more than 1: mean ± standard deviation over seeds.",
        "pt": "Onde n é mais que 1: média ± desvio padrão entre sementes.",
    },
    "data": {
        "en": "Every figure is in this file too, as JSON in its last element; it opens without a network.",
        "pt": "Todos os números também estão neste arquivo, como JSON no último elemento; ele abre sem rede.",
    },
    "more": {"en": "{n} more rows: in the data of this file.", "pt": "mais {n} linhas: nos dados deste arquivo."},
    "no_curves": {
        "en": "The curves could not be read: the service did not answer.",
        "pt": "As curvas não puderam ser lidas: o serviço não respondeu.",
    },
    "continues": {"en": "what it continues", "pt": "o que continua"},
}


def word(key: str, language: Language, /, **values: object) -> str:
    """The text of a key, with its places filled."""
    return WORDS[key][language].format(**values)
