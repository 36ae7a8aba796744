/** Starts the page: the language, then the frame with the view that the address names. */
import { render } from "preact";
import { html } from "htm/preact";
import { readSession } from "./api.js";
import { chooseLanguage, loadTexts } from "./i18n.js";
import { Shell } from "./parts/shell.js";
import { route } from "./router.js";
import { loadView, viewOf, VIEWS } from "./views.js";

// At once, not after one another: who asks, the frame's texts, and the view that the address names.
const asked = readSession().catch(() => {}); // a view that asks finds out, too
await chooseLanguage();
const name = viewOf(route.value.path);
if (VIEWS[name]) loadView(name).catch(() => {}); // the frame asks again, and shows what is wrong
await Promise.all([loadTexts("common"), asked]);
render(html`<${Shell} />`, document.getElementById("app"));
