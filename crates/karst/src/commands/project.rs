//! `project`.

use serde_json::{Value, json};

use super::{
    common::Common,
    completion::complete,
    object::{Object, config_object, create},
};
use crate::{
    client::{About, Kind, Url},
    context::{Context, at, project_file},
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units, yes_no,
    },
};

/// `project ...`
#[derive(Debug, clap::Subcommand)]
pub enum Project {
    /// List projects
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a project
    Create {
        /// Its name
        name: String,
        /// Its keys
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// The same, as Incus' client has it
        #[arg(short = 'c', long = "config", value_name = "KEY=VALUE")]
        config: Vec<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// Show a project's limits and what of them is used
    Info {
        /// Project
        #[arg(add = complete(Kind::Project))]
        name: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Work in this project from now on (kept in the user's configuration)
    Switch {
        /// Project
        #[arg(add = complete(Kind::Project))]
        name: String,
    },
    /// Print the project that commands work in
    Current,
    #[command(flatten)]
    Common(Common),
}

fn project(name: &str) -> Object {
    Object {
        url: Url::new(&["projects", name]),
        kind: Kind::Project,
        name: name.to_owned(),
        fields: &["config", "description"],
    }
}

impl Project {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { format } => {
                let objects = client.get(&Url::new(&["projects"]).with("recursion", 1)).await?.metadata;
                let columns =
                    &["NAME", "IMAGES", "PROFILES", "VOLUMES", "NETWORKS", "DESCRIPTION", "USED BY"];
                let list = List::of(columns, objects, |project| {
                    let own = |feature: &str| {
                        yes_no(member(&project["config"], &format!("features.{feature}")) == "true")
                    };
                    let name = member(project, "name");
                    vec![
                        if name == client.project() { format!("{name} (current)") } else { name },
                        own("images"),
                        own("profiles"),
                        own("storage.volumes"),
                        own("networks"),
                        member(project, "description"),
                        project["used_by"].as_array().map_or(0, Vec::len).to_string(),
                    ]
                });
                list.print(format.format)
            }
            Self::Create { name, mut keys, config, description } => {
                keys.extend(config);
                let mut body = json!({"name": name, "config": config_object(&keys)?});
                if let Some(description) = description {
                    body["description"] = json!(description);
                }
                create(context, &Url::new(&["projects"]), body, format!("creating project {name}")).await
            }
            Self::Info { name, format } => {
                let url = project(&name).url.join("state");
                let state = client.get(&url).await.about(client, Kind::Project, &name)?.metadata;
                let resources = state["resources"].as_object().into_iter().flatten();
                let rows: Vec<Value> = resources
                    .map(|(resource, of)| json!({"resource": resource, "limit": of["Limit"], "usage": of["Usage"]}))
                    .collect();
                let list = List::of(&["RESOURCE", "LIMIT", "USED"], Value::Array(rows), |row| {
                    let resource = member(row, "resource");
                    let shown = |field: &str| match row[field].as_i64() {
                        Some(n) if n < 0 => "unlimited".to_owned(),
                        Some(n) if ["disk", "memory"].contains(&resource.as_str()) => {
                            units::bytes(n.unsigned_abs())
                        }
                        Some(n) => n.to_string(),
                        None => String::new(),
                    };
                    vec![resource.clone(), shown("limit"), shown("usage")]
                });
                list.print(format.format)
            }
            Self::Switch { name } => {
                client.get(&project(&name).url).await.about(client, Kind::Project, &name)?;
                let file =
                    project_file().ok_or_else(|| Error::local("neither XDG_CONFIG_HOME nor HOME is set"))?;
                let directory = file.parent().unwrap_or(&file);
                std::fs::create_dir_all(directory).map_err(|error| at(directory, &error))?;
                std::fs::write(&file, format!("{name}\n")).map_err(|error| at(&file, &error))
            }
            Self::Current => output::line(client.project()),
            Self::Common(command) => command.run(context, project).await,
        }
    }
}
