/** The page's frame: menu, language and colours, the connection's state, the view, and the sign-in form. */
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { connection, lacksKey, mayChange, session, signOut } from "../api.js";
import { chooseLanguage, language, LANGUAGES, t } from "../i18n.js";
import { href, route } from "../router.js";
import { loadView, VIEWS, viewOf } from "../views.js";
import { attempt, ErrorBox, Toasts } from "./basics.js";
import { SignIn } from "./sign_in.js";

/** The view of the address, once it is loaded; the view before, with its own `id`, shows until then. */
function useView(name, id) {
  const [shown, show] = useState({ name: null });
  useEffect(() => {
    if (!VIEWS[name]) return show({ name, id, missing: true });
    let current = true;
    loadView(name).then(
      (component) => current && show({ name, id, component }),
      (error) => current && show({ name, id, error }),
    );
    return () => {
      current = false;
    };
  }, [name, id]);
  return shown;
}

/** Everything on the page. */
export function Shell() {
  const { path } = route.value;
  const name = viewOf(path);
  const shown = useView(name, path[1]);
  const main = useRef();
  useEffect(() => {
    // A new view begins at its heading, for the keyboard and for screen readers; the first one where the browser says.
    if (shown.component && document.activeElement !== document.body) main.current.focus({ preventScroll: true });
  }, [shown.name, shown.id]);
  return html`
    <a class="skip" href="#main">${t("common.skip")}</a>
    <header class="top">
      <a class="brand" href=${href([])} aria-label="nanomoe">nano<b>moe</b></a>
      <${Menu} current=${name} />
      <${Connection} />
      <${Owner} />
      <${Choices} />
    </header>
    <main id="main" ref=${main} tabindex="-1">
      ${shown.component && !lacksKey() && html`<${shown.component} key=${`${shown.name}/${shown.id ?? ""}`} id=${shown.id} />`}
      ${shown.missing && html`<h1>${t("common.no_such_view")}</h1>`}
      ${shown.error && html`<${ErrorBox} error=${shown.error} />`}
    </main>
    <${Toasts} />
    ${lacksKey() && html`<${SignIn} />`}
  `;
}

function Menu({ current }) {
  return html`<nav aria-label=${t("common.menu")}>
    ${Object.keys(VIEWS).map(
      (name) =>
        VIEWS[name].inMenu &&
        (mayChange() || !VIEWS[name].changes) &&
        html`<a href=${href([name])} aria-current=${belongsTo(current, name) ? "page" : null}>${t(`common.view.${name}`)}</a>`,
    )}
  </nav>`;
}

const belongsTo = (current, name) => current === name || `${current}s` === name;

function Connection() {
  const isLost = connection.value === "offline";
  return html`<p class="connection" role="status">${isLost && html`<span class="dot"></span>${t("common.reconnecting")}`}</p>`;
}

/** Whose key it is, and the way out; nothing where no key is needed. */
function Owner() {
  const { key_required, owner, role } = session.value ?? {};
  if (!key_required || role === null) return null;
  return html`<p class="owner muted" title=${t(`common.role.${role}`)}>
    ${owner} <button class="small plain" onClick=${() => attempt(signOut)}>${t("common.sign_out")}</button>
  </p>`;
}

function Choices() {
  const [theme, setTheme] = useState(localStorage.getItem("nanomoe.theme") ?? "auto");
  const choose = (value) => {
    localStorage.setItem("nanomoe.theme", value);
    document.documentElement.dataset.theme = value;
    dispatchEvent(new Event("nanomoe:theme"));
    setTheme(value);
  };
  return html`<div class="choices">
    <select aria-label=${t("common.language")} value=${language.value} onChange=${(e) => chooseLanguage(e.target.value)}>
      ${Object.entries(LANGUAGES).map(([tag, name]) => html`<option value=${tag}>${name}</option>`)}
    </select>
    <select aria-label=${t("common.theme")} value=${theme} onChange=${(e) => choose(e.target.value)}>
      ${["auto", "light", "dark"].map((one) => html`<option value=${one}>${t(`common.theme.${one}`)}</option>`)}
    </select>
  </div>`;
}
