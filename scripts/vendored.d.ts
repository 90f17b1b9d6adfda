// The page's vendored libraries, which its scripts find as globals.
declare const uPlot: any;
declare const Diff: any;
