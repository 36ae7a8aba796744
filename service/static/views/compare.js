/** Any jobs side by side: those that the address names, or those with a tag. */
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { t } from "../i18n.js";
import { useTitle } from "../parts/basics.js";
import { Comparison } from "../parts/comparison.js";
import { queryList, route, setQuery } from "../router.js";

export default function Compare() {
  const { tag, sweep } = route.value.query;
  const jobs = queryList("job");
  useTitle(t("compare.title"));
  const selection = sweep ? { sweep } : tag ? { tag } : { job: jobs };
  const isEmpty = !sweep && !tag && !jobs.length;
  return html`
    <h1>${tag ? t("compare.title_tag", { tag }) : t("compare.title")}</h1>
    ${isEmpty ? html`<${Selecting} />` : html`<${Comparison} selection=${selection} />`}
  `;
}

function Selecting() {
  const [tag, setTag] = useState("");
  const submit = (event) => {
    event.preventDefault();
    if (tag.trim()) setQuery({ tag: tag.trim() }, { push: true });
  };
  return html`<p>${t("compare.how")}</p>
    <form class="actions" onSubmit=${submit}>
      <label class="choice"><span>${t("compare.tag")}</span>
        <input value=${tag} onInput=${(event) => setTag(event.target.value)} placeholder="course=nlp-101" /></label>
      <button class="primary">${t("compare.go")}</button>
    </form>`;
}
