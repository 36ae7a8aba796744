/** The checkpoint that a job goes on from: typed as `JOB@PERCENT`, or chosen among those of the newest trained jobs. */
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { get } from "../../api.js";
import { t } from "../../i18n.js";
import { useData } from "../../parts/basics.js";

const PERCENTS = [100, 75, 50, 25, 0];
const N_JOBS = 50;

/** `given`: the field's text. `change(text)` is called with the new one. The jobs are asked for once the field is used. */
export function ParentField({ id, given = "", fault, change }) {
  const [isUsed, use] = useState(given !== "");
  const { data } = useData(
    (signal) => (isUsed ? get("/jobs", { status: "succeeded", limit: N_JOBS }, { signal }) : null),
    [isUsed],
  );
  const jobs = data?.data ?? [];
  const nameOf = (job) => job.name ?? job.id.slice(0, 12);
  const [reference, percent = "100"] = given.split("@");
  const chosen = jobs.find((job) => job.id === reference || job.name === reference);
  const describedBy = [chosen && `${id}-chosen`, fault && `${id}-fault`].filter(Boolean).join(" ");
  return html`<span class="parent">
    <input
      id=${id}
      value=${given}
      list=${`${id}-checkpoints`}
      placeholder=${t("new.parent_hint")}
      aria-invalid=${Boolean(fault)}
      aria-describedby=${describedBy || null}
      spellcheck="false"
      autocomplete="off"
      onFocus=${() => use(true)}
      onInput=${(event) => change(event.target.value)}
    />
    <datalist id=${`${id}-checkpoints`}>
      ${jobs.flatMap((job) =>
        PERCENTS.map((one) => html`<option key=${`${job.id}@${one}`} value=${`${job.id}@${one}`}>${nameOf(job)} · ${one} %</option>`),
      )}
    </datalist>
    ${chosen && html`<small class="muted" id=${`${id}-chosen`}>${nameOf(chosen)} · ${percent} %</small>`}
  </span>`;
}
