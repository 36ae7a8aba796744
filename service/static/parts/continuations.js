/** The same prompt continued by several checkpoints, each as it is generated, with what else was likely at each token. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { request } from "../api.js";
import { readEvents } from "../events.js";
import { figure, percent as share } from "../format.js";
import { t } from "../i18n.js";
import { href } from "../router.js";
import { ErrorBox } from "./basics.js";
import { Tokens, lossClass, visible } from "./tokens.js";

const ALTERNATIVES = 5;

/** What stands where a token holds only a part of a character. */
const BROKEN = "\ufffd";

/**
 * A text as spans `{text, tokens}`: a token each, and those together that share a character.
 *
 * Exported for its test.
 */
export function spansOf(text, tokens) {
  const spans = [];
  let place = 0;
  let parts = [];
  const close = (end) => {
    if (parts.length) spans.push({ text: text.slice(place, end), tokens: parts });
    [place, parts] = [end, []];
  };
  for (const token of tokens) {
    const start = token.text.includes(BROKEN) ? -1 : text.indexOf(token.text, place);
    if (start < 0 || (start !== place && !parts.length)) {
      parts.push(token);
      continue;
    }
    close(start);
    spans.push({ text: token.text, tokens: [token] });
    place = start + token.text.length;
  }
  close(text.length);
  return spans;
}

/** `run`: `{number, prompt, targets, body}`. */
export const Continuations = ({ run, titleOf }) => html`<p class="muted">${t("generate.seed_used", { seed: run.body.seed })}</p>
  <div class="texts">
    ${run.targets.map((target) => html`<${Column} key=${target.key} target=${target} run=${run} title=${titleOf(target)} />`)}
  </div>`;

/** Generates as soon as it is shown, and anew with each run; a run that is left is stopped. */
function useGeneration(target, run) {
  const [state, setState] = useState({ text: "", tokens: [], end: null, error: null });
  useEffect(() => {
    const aborter = new AbortController();
    const { signal: abort } = aborter;
    const found = { text: "", tokens: [], end: null, error: null };
    const show = () => !abort.aborted && setState({ ...found });
    const generate = async () => {
      const { job_id, checkpoint } = target;
      const body = { ...run.body, job_id, checkpoint, prompt: run.prompt, stream: true, logprobs: true, alternatives: ALTERNATIVES };
      const answer = await request("POST", "/generate", { body, signal: abort });
      for await (const { event, data } of readEvents(answer.body)) {
        if (event === "chunk") {
          found.text += data.text;
          found.tokens = [...found.tokens, ...(data.logprobs ?? [])];
        } else if (event === "end") found.end = data;
        else if (event === "error") found.error = Object.assign(new Error(data.detail), data);
        show();
      }
    };
    setState({ ...found });
    generate().catch((error) => {
      found.error = error;
      show();
    });
    return () => aborter.abort();
  }, [run.number, target.key]);
  return state;
}

const spanText = (span) => span.text;
const spanKind = (span) => lossClass(-span.tokens[0].logprob);

function Column({ target, run, title }) {
  const { text, tokens, end, error } = useGeneration(target, run);
  const pointed = useMemo(() => signal(null), []);
  const spans = useMemo(() => spansOf(text, tokens), [text, tokens]);
  return html`<article class="card continuation-of" aria-label=${title} aria-busy=${!end && !error}>
    <h3><a href=${href(["jobs", target.job_id])}>${title}</a></h3>
    <${ErrorBox} error=${error} />
    <p class="prompt" tabindex="0">${visible(run.prompt)}</p>
    <${Tokens} tokens=${spans} text=${spanText} kind=${spanKind} pointed=${pointed} label=${t("generate.continuation_of", { name: title })} />
    <${Alternatives} spans=${spans} pointed=${pointed} />
    <p class="measured">${end
      ? t("generate.end", { n: end.usage.completion_tokens, speed: figure(end.timing.tok_per_sec, 3) })
      : error ? "" : t("generate.running")}
      ${end?.window_slid && html` · ${t("generate.slid")}`}</p>
  </article>`;
}

/** The tokens that were likely where the pointer is, as bars. */
function Alternatives({ spans, pointed }) {
  const span = spans[pointed.value ?? -1];
  if (!span) return html`<p class="alternatives muted">${spans.length > 0 && t("generate.point")}</p>`;
  const [token] = span.tokens;
  const likely = token.alternatives;
  const isAmong = likely.some((one) => one.token === token.token);
  return html`<div class="alternatives" aria-live="polite">
    ${[...likely, ...(isAmong ? [] : [token])].map(
      (one) => html`<${Bar} key=${one.token} text=${one.text} probability=${Math.exp(one.logprob)} isChosen=${one.token === token.token} />`,
    )}
  </div>`;
}

/** A token with its probability as a bar. */
export const Bar = ({ text, probability, isChosen = false }) => html`<div class="likely ${isChosen ? "chosen" : ""}">
  <span class="mono">${isChosen ? "▸ " : ""}${visible(text) || "∅"}</span>
  <span class="gauge"><span style=${{ inlineSize: `${100 * probability}%` }}></span></span>
  <span class="number">${share(probability, probability < 0.1 ? 1 : 0)}</span>
</div>`;
