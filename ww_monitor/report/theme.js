const night = matchMedia("(prefers-color-scheme: dark)");
const setTheme = () => { document.documentElement.dataset.theme = night.matches ? "dark" : "light"; };
setTheme();
