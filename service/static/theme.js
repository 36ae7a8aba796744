/** The chosen colours, set before anything is painted. A plain script: a module would run after the first paint. */
document.documentElement.dataset.theme = localStorage.getItem("nanomoe.theme") ?? "auto";
