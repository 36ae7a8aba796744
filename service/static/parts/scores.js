/** How surprised checkpoints are by a text, token by token, and which part of it they could have by heart. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useMemo } from "preact/hooks";
import { post } from "../api.js";
import { bytes, figure, percent as share } from "../format.js";
import { t } from "../i18n.js";
import { href } from "../router.js";
import { ErrorBox, Skeleton, useData } from "./basics.js";
import { groupsOf } from "./characters.js";
import { Tokens, lossClass, visible } from "./tokens.js";

/** `run`: `{number, prompt, targets}`. */
export const Scores = ({ run, titleOf }) => html`<div class="texts">
  ${run.targets.map((target) => html`<${Column} key=${target.key} target=${target} run=${run} title=${titleOf(target)} />`)}
</div>`;

const tokenText = (token) => token.text;

/** Tokens that share a character as one, with the sum of their losses: that of the character. */
const joined = (tokens, text) =>
  groupsOf(tokens, new TextEncoder().encode(text)).map(({ text: whole, tokens: group }) =>
    group.length === 1 ? group[0] : { ...group[0], text: whole, loss: group.reduce((sum, { loss }) => sum + (loss ?? 0), 0) },
  );

function Column({ target, run, title }) {
  const { job_id, checkpoint } = target;
  const { data, error } = useData((abort) => post("/score", { job_id, checkpoint, text: run.prompt }, { signal: abort }), [run.number, target.key]);
  const pointed = useMemo(() => signal(null), []);
  const copied = data?.copied;
  const tokens = useMemo(() => (data ? joined(data.tokens, run.prompt) : []), [data]);
  const kind = useMemo(() => {
    const isCopied = ({ byte_offset: offset }) => copied && offset >= copied.start && offset < copied.start + copied.n_bytes;
    return (token) => `${token.loss === null ? "" : lossClass(token.loss)} ${isCopied(token) ? "copied" : ""}`;
  }, [copied]);
  return html`<article class="card" aria-label=${title}>
    <h3><a href=${href(["jobs", job_id])}>${title}</a></h3>
    <${ErrorBox} error=${error} />
    ${!data && !error && html`<${Skeleton} lines="5" />`}
    ${data &&
    html`<p class="measured">${t("generate.score", { loss: figure(data.loss), perplexity: figure(data.perplexity), bits: figure(data.bits_per_byte) })}</p>
      <${Tokens} tokens=${tokens} text=${tokenText} kind=${kind} pointed=${pointed} label=${t("generate.scored_text")} />
      <${Pointed} tokens=${tokens} pointed=${pointed} />
      <p class="note">${copied
        ? t("generate.copied", { size: bytes(copied.n_bytes), share: share(copied.n_bytes / new TextEncoder().encode(run.prompt).length), text: shortened(copied.text) })
        : t("generate.nothing_copied")}</p>`}
  </article>`;
}

const shortened = (text) => (text.length > 60 ? `${text.slice(0, 40)} … ${text.slice(-15)}` : text);

function Pointed({ tokens, pointed }) {
  const token = tokens[pointed.value ?? -1];
  if (!token) return html`<p class="pointed-at muted">${t("generate.point_loss")}</p>`;
  const text = token.loss === null
    ? t("generate.first_token")
    : t("generate.token_loss", { loss: figure(token.loss, 3), share: share(Math.exp(-token.loss), 1) });
  return html`<p class="pointed-at" aria-live="polite"><b class="mono">${visible(token.text)}</b> ${text}</p>`;
}
