//! Lists in the formats of `--format`.

use std::str::FromStr;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

use super::{print, to_yaml};
use crate::error::{Error, Result};

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// With borders.
    Table,
    /// Without borders.
    Compact,
    /// Comma separated, without a header unless asked for.
    Csv,
    /// The server's objects, in one line.
    Json,
    /// The server's objects.
    Yaml,
}

/// A style and whether it has a header: `csv,header`, `table,noheader`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// The style.
    pub style: Style,
    /// Whether the names of the columns are printed.
    pub header: bool,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (style, rest) = text.split_once(',').map_or((text, None), |(style, rest)| (style, Some(rest)));
        let style = match style {
            "table" => Style::Table,
            "compact" => Style::Compact,
            "csv" => Style::Csv,
            "json" => Style::Json,
            "yaml" => Style::Yaml,
            _ => return Err("one of table, compact, csv, json, yaml".to_owned()),
        };
        let header = match rest {
            None => style != Style::Csv,
            Some("header") => true,
            Some("noheader") => false,
            Some(_) => return Err("after the comma: header or noheader".to_owned()),
        };
        Ok(Self { style, header })
    }
}

/// The option that all listing commands have.
#[derive(Debug, Clone, clap::Args)]
pub struct FormatOption {
    /// Format: table, compact, csv, json or yaml; ",header" or ",noheader" may follow
    #[arg(short, long, value_name = "FORMAT", default_value = "table", hide_default_value = true)]
    pub format: Format,
}

/// Rows for people and the objects behind them for programs.
#[derive(Debug, Default)]
pub struct List {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// One row an object; cells may have several lines.
    pub rows: Vec<Vec<String>>,
    /// The server's objects as they came.
    pub objects: Value,
}

impl List {
    /// With these columns.
    pub fn new(columns: &[&str], objects: Value) -> Self {
        Self { columns: columns.iter().map(|name| (*name).to_owned()).collect(), rows: Vec::new(), objects }
    }

    /// With a row for each of the server's objects.
    pub fn of(columns: &[&str], objects: Value, row: impl Fn(&Value) -> Vec<String>) -> Self {
        let mut list = Self::new(columns, Value::Null);
        list.rows = objects.as_array().into_iter().flatten().map(row).collect();
        list.objects = objects;
        list
    }

    /// Prints it.
    pub fn print(&self, format: Format) -> Result<()> {
        print(&self.render(format)?)
    }

    /// The text, ending in a newline unless it is empty.
    pub fn render(&self, format: Format) -> Result<String> {
        Ok(match format.style {
            Style::Json => format!("{}\n", serde_json::to_string(&self.objects).map_err(Error::local)?),
            Style::Yaml => to_yaml(&self.objects)?,
            Style::Csv => self.csv(format.header),
            Style::Table | Style::Compact => self.table(format),
        })
    }

    fn csv(&self, header: bool) -> String {
        let head = header.then_some(&self.columns);
        let mut text = String::new();
        for row in head.into_iter().chain(&self.rows) {
            let cells: Vec<String> = row.iter().map(|cell| quote(cell)).collect();
            text.push_str(&cells.join(","));
            text.push('\n');
        }
        text
    }

    fn table(&self, format: Format) -> String {
        let mut table = Table::new();
        table.set_content_arrangement(ContentArrangement::Disabled);
        if format.style == Style::Table {
            table.load_preset(presets::ASCII_FULL);
            // One rule under the header only, so that it can be read and cut alike.
            table.set_style(comfy_table::TableComponent::HeaderLines, '-');
            table.set_style(comfy_table::TableComponent::LeftHeaderIntersection, '+');
            table.set_style(comfy_table::TableComponent::RightHeaderIntersection, '+');
            table.set_style(comfy_table::TableComponent::MiddleHeaderIntersections, '+');
            table.remove_style(comfy_table::TableComponent::HorizontalLines);
            table.remove_style(comfy_table::TableComponent::LeftBorderIntersections);
            table.remove_style(comfy_table::TableComponent::RightBorderIntersections);
            table.remove_style(comfy_table::TableComponent::MiddleIntersections);
        } else {
            table.load_preset(presets::NOTHING);
        }
        if format.header {
            table.set_header(&self.columns);
        }
        for row in &self.rows {
            table.add_row(row);
        }
        if format.style == Style::Compact {
            for column in table.column_iter_mut() {
                column.set_padding((0, 2));
                column.set_cell_alignment(CellAlignment::Left);
            }
        }
        if !format.header && self.rows.is_empty() {
            return String::new();
        }
        let mut text = String::new();
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A CSV cell as RFC 4180 wants it.
fn quote(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn list() -> List {
        let objects =
            json!([{"name": "c1", "ip": "10.0.0.2 (eth0)\nfe80::1 (eth0)"}, {"name": "a,b\"c", "ip": ""}]);
        List::of(&["NAME", "IPV4"], objects, |o| {
            vec![super::super::member(o, "name"), super::super::member(o, "ip")]
        })
    }

    fn render(format: &str) -> String {
        list().render(format.parse().unwrap()).unwrap()
    }

    #[test]
    fn formats() {
        insta::assert_snapshot!("table", render("table"));
        insta::assert_snapshot!("table_noheader", render("table,noheader"));
        insta::assert_snapshot!("compact", render("compact"));
        insta::assert_snapshot!("csv", render("csv"));
        insta::assert_snapshot!("csv_header", render("csv,header"));
        insta::assert_snapshot!("json", render("json"));
        insta::assert_snapshot!("yaml", render("yaml"));
    }

    #[test]
    fn empty_lists() {
        let empty = List::of(&["NAME"], json!([]), |_| Vec::new());
        assert_eq!(empty.render("csv".parse().unwrap()).unwrap(), "");
        assert_eq!(empty.render("json".parse().unwrap()).unwrap(), "[]\n");
        assert!(empty.render("table".parse().unwrap()).unwrap().contains("NAME"));
    }

    #[test]
    fn wrong_formats() {
        assert!("xml".parse::<Format>().is_err());
        assert!("csv,foo".parse::<Format>().is_err());
    }
}
