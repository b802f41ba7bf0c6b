//! Plots: lines over a logarithmic axis, as text that a browser shows.

use std::collections::BTreeMap;

use crate::figures::{line, rate};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// One plot: points of each series, over what, in what.
pub struct Plot<'a> {
    pub title: &'a str,
    pub across: &'a str,
    pub up: &'a str,
    pub series: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Plot<'_> {
    pub fn svg(&self) -> String {
        let all = || self.series.values().flatten();
        let xs: Vec<f64> = all().map(|(x, _)| *x).collect();
        let top = all().map(|(_, y)| *y).fold(1e-9, f64::max) * 1.1;
        // A share of nothing has no logarithm.
        let is_linear = xs.iter().any(|x| *x <= 0.0);
        let scale = |x: f64| if is_linear { x } else { x.log10() };
        let (first, last) =
            xs.iter().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(scale(*x)), high.max(scale(*x))));
        let span = (last - first).max(1e-9);
        let across = |x: f64| LEFT + (scale(x) - first) / span * (WIDTH - LEFT - RIGHT);
        let up = |y: f64| HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM);
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        line(
            &mut text,
            format_args!("<text x=\"{middle}\" y=\"20\" text-anchor=\"middle\" font-size=\"14\">{}</text>", self.title),
        );
        let foot = HEIGHT - 10.0;
        line(
            &mut text,
            format_args!("<text x=\"{middle}\" y=\"{foot}\" text-anchor=\"middle\">{}</text>", self.across),
        );
        for step in 0..=4 {
            let value = top * f64::from(step) / 4.0;
            let (y, right, label_x) = (up(value), WIDTH - RIGHT, LEFT - 8.0);
            line(
                &mut text,
                format_args!("<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"),
            );
            let (label, y) = (short(value), y + 4.0);
            line(&mut text, format_args!("<text x=\"{label_x}\" y=\"{y:.1}\" text-anchor=\"end\">{label}</text>"));
        }
        line(&mut text, format_args!("<text x=\"{LEFT}\" y=\"{}\" text-anchor=\"end\">{}</text>", TOP - 8.0, self.up));
        let mut ticks = xs.clone();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        for tick in ticks {
            let (x, y, label) = (across(tick), HEIGHT - BOTTOM + 18.0, short(tick));
            line(&mut text, format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>"));
        }
        for (index, (name, points)) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let path: Vec<_> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
            let path = path.join(" ");
            line(
                &mut text,
                format_args!("<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"),
            );
            for (x, y) in points {
                let (x, y) = (across(*x), up(*y));
                line(&mut text, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
            }
            let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 20.0 * index as f64);
            line(
                &mut text,
                format_args!("<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>", y - 10.0),
            );
            line(&mut text, format_args!("<text x=\"{}\" y=\"{y}\">{name}</text>", x + 18.0));
        }
        text.push_str("</svg>\n");
        text
    }
}

fn short(value: f64) -> String {
    match value {
        _ if value >= 1_000_000.0 => format!("{:.0}M", value / 1_000_000.0),
        _ if value >= 1_000.0 => rate(value).replace(".0k", "k"),
        _ if value == 0.0 || value >= 10.0 => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}
