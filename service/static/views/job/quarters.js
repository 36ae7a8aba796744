/** The five checkpoints side by side: figures, the text as each reconstructs it, and what each continues. */
import { useSignal } from "@preact/signals";
import { html } from "htm/preact";
import { useMemo } from "preact/hooks";
import { count, figure, percent, short } from "../../format.js";
import { t } from "../../i18n.js";
import { Help, Section } from "../../parts/basics.js";
import { differences } from "../../parts/text_difference.js";
import { lossClass, Tokens, visible } from "../../parts/tokens.js";
import { href, route, setQuery } from "../../router.js";

const PERCENTS = [0, 25, 50, 75, 100];

const FIGURES = [
  ["loss", figure],
  ["perplexity", figure],
  ["accuracy", (value) => percent(value, 1)],
  ["bits_per_byte", figure],
  ["train_loss", figure],
  ["val_loss", figure],
  ["tok_per_sec", short],
];

const predictedText = (token) => token.predicted;
const targetText = (token) => token.target;
const kindOf = (token) => `${lossClass(token.loss)} ${token.predicted === token.target ? "" : "wrong"}`.trim();

export function Quarters({ job, checkpoints, tokens }) {
  const pointed = useSignal(null);
  const shows = route.value.query.text === "target" ? "target" : "predicted";
  const shown = FIGURES.filter(([name]) => name !== "val_loss" || checkpoints.some((one) => typeof one.val_loss === "number"));
  const truth = useMemo(() => {
    const any = Object.values(tokens)[0];
    return any?.length ? (any[0].input ?? "") + any.map((token) => token.target).join("") : null;
  }, [tokens]);
  if (!checkpoints.length) return null;
  const isTruncated = checkpoints.some((one) => one.reconstruction?.truncated);
  const actions = html`<div class="actions">
    <span class="loss-key" aria-hidden="true">${t("job.loss")} 0 <i></i> 5+</span>
    <button class="small" aria-pressed=${shows === "predicted"} onClick=${() => setQuery({ text: null })}>${t("job.shows_predicted")}</button>
    <button class="small" aria-pressed=${shows === "target"} onClick=${() => setQuery({ text: "target" })}>${t("job.shows_target")}</button>
    <${Help} text=${t("job.quarters_help")} label=${t("job.quarters")} />
  </div>`;
  return html`<${Section} title=${t("job.quarters")} actions=${actions} id="quarters">
    <div class="quarters scroll" tabindex="0" role="group" aria-label=${t("job.quarters")}>
      ${PERCENTS.map((one) => {
        const checkpoint = checkpoints.find((found) => found.percent === one);
        return html`<${Quarter}
          key=${one}
          job=${job}
          percent=${one}
          checkpoint=${checkpoint}
          figures=${shown}
          tokens=${tokens[one]}
          shows=${shows}
          pointed=${pointed}
          truth=${truth}
        />`;
      })}
    </div>
    ${isTruncated && html`<p class="muted">${t("job.truncated")}</p>`}
  </${Section}>`;
}

function Quarter({ job, percent: name, checkpoint, figures, tokens, shows, pointed, truth }) {
  const title = t(`job.quarter.${name}`);
  if (!checkpoint) {
    return html`<article class="quarter missing"><h3><i class=${`swatch q${name}`}></i>${name} %</h3><p class="muted">${t(job.finished_at ? "job.not_reached" : "job.not_yet")}</p></article>`;
  }
  return html`<article class="quarter" aria-label=${`${name} %`}>
    <h3>
      <i class=${`swatch q${name}`}></i>${name} %
      <span class="muted">${title}</span>
      ${checkpoint.best && html`<span class="chip">${t("job.best")}</span>`}
    </h3>
    <dl>
      <div><dt>${t("job.step")}</dt><dd>${count(checkpoint.step)}</dd></div>
      ${figures.map(([key, format]) => html`<div key=${key}><dt>${t(`job.figure.${key}`)}</dt><dd>${format(checkpoint[key])}</dd></div>`)}
    </dl>
    <div class="reading">
      <h4>${t("job.reconstruction")}</h4>
      ${tokens
        ? html`<div class="box">
            <${Tokens}
              tokens=${tokens}
              text=${shows === "target" ? targetText : predictedText}
              kind=${kindOf}
              pointed=${pointed}
              label=${t("job.reconstruction_of", { percent: name })}
            />
          </div>`
        : html`<p class="box muted">${checkpoint.reconstruction?.text ?? "…"}</p>`}
      <${Pointed} tokens=${tokens} pointed=${pointed} />
    </div>
    <div class="continuation">
      <h4>${t("job.continuation")}</h4>
      <${Continuation} continuation=${checkpoint.continuation} truth=${truth} />
      <a href=${href(["generate"], { checkpoint: `${job.id}@${name}`, prompt: checkpoint.continuation?.prompt })}>${t("job.generate_from")}</a>
    </div>
  </article>`;
}

/** What this checkpoint says at the place that is pointed at in any of them. */
function Pointed({ tokens, pointed }) {
  const token = tokens?.[pointed.value ?? -1];
  if (!token) return html`<p class="pointed-at muted">${t("job.point")}</p>`;
  const isRight = token.predicted === token.target;
  return html`<p class="pointed-at" aria-live="polite">
    <span class="muted">${t("job.target")}</span> <b>${visible(token.target)}</b>
    <span class="muted">${t("job.predicted")}</span> <b class=${isRight ? "right" : "bad"}>${isRight ? "✓" : "✕"} ${visible(token.predicted)}</b>
    <span class="muted">${t("job.loss")}</span> <b>${figure(token.loss, 3)}</b>
  </p>`;
}

/** The prompt and what was added to it; what differs from the training text is marked. */
function Continuation({ continuation, truth }) {
  const pieces = useMemo(() => {
    if (!continuation) return [];
    const { prompt, text } = continuation;
    if (!truth?.startsWith(prompt)) return [{ text, same: true }];
    return differences(text, truth.slice(prompt.length, prompt.length + 2 * text.length + 40));
  }, [continuation?.text, continuation?.prompt, truth]);
  if (!continuation) return html`<p class="muted">–</p>`;
  return html`<p class="continued">
    <span class="muted">${continuation.prompt}</span>${pieces.map((piece, i) =>
      piece.same ? html`<span key=${i}>${piece.text}</span>` : html`<mark key=${i}>${piece.text}</mark>`,
    )}
  </p>`;
}
