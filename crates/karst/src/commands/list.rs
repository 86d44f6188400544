//! `list`: one request, filtered here.

use regex::Regex;
use serde_json::Value;

use super::list_columns::{COLUMNS_HELP, Column, config, parse_columns};
use crate::{
    client::{Client, Instance, Url},
    context::Context,
    error::{Error, Result},
    output::table::{FormatOption, List as Table},
};

/// What is shown without `--columns`.
const DEFAULT_COLUMNS: &str = "nst46um";
/// What needs neither state nor snapshots.
const FAST_COLUMNS: &str = "nstcaPb";

/// Options of `list`.
#[derive(Debug, clap::Args)]
pub struct List {
    /// Names (beginning or regular expression), or KEY=VALUE of status, type, name, architecture, location, project,
    /// profile or of a configuration key; all must hold, of names any
    filters: Vec<String>,
    #[command(flatten)]
    format: FormatOption,
    #[arg(short, long, help = COLUMNS_HELP)]
    columns: Option<String>,
    /// Without addresses and use, which is less work for the server
    #[arg(long, conflicts_with = "columns")]
    fast: bool,
    /// Instances of all projects
    #[arg(long, visible_alias = "all")]
    all_projects: bool,
}

impl List {
    /// Lists.
    pub async fn run(self, context: &Context) -> Result<()> {
        let mut columns = parse_columns(self.columns.as_deref().unwrap_or(if self.fast {
            FAST_COLUMNS
        } else {
            DEFAULT_COLUMNS
        }))?;
        if self.all_projects && self.columns.is_none() {
            columns.insert(0, Column::of('e').expect("a column"));
        }
        let filters = self.filters.iter().map(|text| Filter::parse(text)).collect::<Result<Vec<_>>>()?;
        // Objects for programs are always whole; a table asks for what its columns need.
        let is_table = !matches!(
            self.format.format.style,
            crate::output::table::Style::Json | crate::output::table::Style::Yaml
        );
        let recursion =
            if self.fast || (is_table && !columns.iter().any(|column| column.needs_state)) { 1 } else { 2 };
        let objects = fetch(&context.client, recursion, self.all_projects).await?;
        table(&columns, &filters, objects)?.print(self.format.format)
    }
}

async fn fetch(client: &Client, recursion: u8, all_projects: bool) -> Result<Vec<Value>> {
    let mut url = Url::new(&["instances"]).with("recursion", recursion);
    if all_projects {
        url = url.with("all-projects", true);
    }
    client.get_as(&url).await
}

/// Filters the objects and puts them into rows, sorted by project and name.
fn table(columns: &[Column], filters: &[Filter], objects: Vec<Value>) -> Result<Table> {
    let mut instances = Vec::with_capacity(objects.len());
    for object in objects {
        let instance: Instance = serde_json::from_value(object.clone())
            .map_err(|error| Error::Local(format!("the server's answer has an unknown shape: {error}")))?;
        if matches(filters, &instance) {
            instances.push((instance, object));
        }
    }
    instances.sort_by(|(a, _), (b, _)| (&a.project, &a.name).cmp(&(&b.project, &b.name)));
    let mut table = Table::new(&[], Value::Null);
    table.columns = columns.iter().map(|column| column.title.clone()).collect();
    let mut sorted = Vec::with_capacity(instances.len());
    for (instance, object) in instances {
        table.rows.push(columns.iter().map(|column| (column.cell)(column, &instance)).collect());
        sorted.push(object);
    }
    table.objects = Value::Array(sorted);
    Ok(table)
}

/// One filter of the command line.
enum Filter {
    /// Beginning of a name, or a regular expression that matches all of it.
    Name(String, Option<Regex>),
    /// A field or configuration key and its value.
    Key(String, String),
}

impl Filter {
    fn parse(text: &str) -> Result<Self> {
        if let Some((key, value)) = text.split_once('=') {
            return Ok(Self::Key(key.to_lowercase(), value.to_owned()));
        }
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if plain {
            return Ok(Self::Name(text.to_owned(), None));
        }
        let regex = Regex::new(&format!("^(?:{text})$"))
            .map_err(|_| Error::Usage(format!("\"{text}\" is neither a name nor a regular expression")))?;
        Ok(Self::Name(text.to_owned(), Some(regex)))
    }

    fn holds(&self, instance: &Instance) -> bool {
        let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
        match self {
            Self::Name(start, regex) => {
                instance.name.starts_with(start)
                    || regex.as_ref().is_some_and(|regex| regex.is_match(&instance.name))
            }
            Self::Key(key, value) => match key.as_str() {
                "name" => instance.name == *value,
                "status" | "state" => same(&instance.status, value),
                "type" => same(&instance.kind, if same(value, "vm") { "virtual-machine" } else { value }),
                "architecture" => same(&instance.architecture, value),
                "location" => instance.location == *value,
                "project" => instance.project == *value,
                "profile" => instance.profiles.contains(value),
                key => config(instance, key) == value,
            },
        }
    }
}

/// Of the names any must match, of the rest all.
fn matches(filters: &[Filter], instance: &Instance) -> bool {
    let mut names = filters.iter().filter(|f| matches!(f, Filter::Name(..))).peekable();
    let by_name = names.peek().is_none() || names.any(|filter| filter.holds(instance));
    by_name && filters.iter().filter(|f| matches!(f, Filter::Key(..))).all(|filter| filter.holds(instance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn objects() -> Vec<Value> {
        vec![
            json!({"name": "web2", "status": "Stopped", "type": "virtual-machine", "project": "default",
                   "expanded_config": {"user.role": "front"}, "snapshots": null, "state": null, "profiles": null}),
            json!({"name": "db", "status": "Running", "type": "container", "project": "default", "ephemeral": true,
                   "profiles": ["default", "big"], "architecture": "x86_64",
                   "expanded_devices": {"root": {"type": "disk", "path": "/", "pool": "fast"}},
                   "state": {"pid": 42, "processes": 7, "cpu": {"usage": 1_500_000_000},
                             "memory": {"usage": 52_428_800, "total": 104_857_600},
                             "disk": {"root": {"usage": 1_048_576}},
                             "network": {
                                "lo": {"type": "loopback", "addresses": [{"family": "inet", "address": "127.0.0.1", "scope": "local"}]},
                                "eth0": {"type": "broadcast", "addresses": [
                                    {"family": "inet", "address": "10.0.0.2", "scope": "global"},
                                    {"family": "inet6", "address": "fd00::2", "scope": "global"},
                                    {"family": "inet6", "address": "fe80::1", "scope": "link"}]}}}}),
        ]
    }

    fn render(columns: &str, filters: &[&str]) -> String {
        let filters: Vec<Filter> = filters.iter().map(|text| Filter::parse(text).unwrap()).collect();
        let table = table(&parse_columns(columns).unwrap(), &filters, objects()).unwrap();
        table.render("csv".parse().unwrap()).unwrap()
    }

    #[test]
    fn default_columns() {
        assert_eq!(
            render(DEFAULT_COLUMNS, &[]),
            "db,RUNNING,CONTAINER (EPHEMERAL),10.0.0.2 (eth0),fd00::2 (eth0),1.50s,50.00MiB\n\
             web2,STOPPED,VIRTUAL-MACHINE,,,,\n"
        );
    }

    #[test]
    fn other_columns() {
        assert_eq!(
            render("nMDbpNSP,user.role:ROLE", &["db"]),
            "db,50.0%,1.00MiB,fast,42,7,0,\"default\nbig\",\n"
        );
        assert_eq!(render("user.role,n", &["web"]), "front,web2\n");
        assert_eq!(parse_columns("nX").err().unwrap().exit_code(), 2);
    }

    #[test]
    fn filters() {
        assert_eq!(render("n", &["web"]), "web2\n");
        assert_eq!(render("n", &["w.*2"]), "web2\n");
        assert_eq!(render("n", &["d", "web"]), "db\nweb2\n");
        assert_eq!(render("n", &["type=vm"]), "web2\n");
        assert_eq!(render("n", &["status=running", "type=vm"]), "");
        assert_eq!(render("n", &["user.role=front"]), "web2\n");
        assert_eq!(render("n", &["profile=big"]), "db\n");
        assert_eq!(Filter::parse("(").err().unwrap().exit_code(), 2);
    }
}
