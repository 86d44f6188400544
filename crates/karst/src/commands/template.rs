//! `config metadata` and `config template`: what is kept of an image's metadata with an instance, and its templates.

use hyper::{HeaderMap, Method};
use serde_json::Value;

use super::{completion::complete, object::Object};
use crate::{
    client::{About, Kind, Url, empty, full},
    context::Context,
    editor,
    error::{Error, Result},
    output,
};

/// Fields of the metadata that PUT takes.
const FIELDS: &[&str] = &["architecture", "creation_date", "expiry_date", "properties", "templates"];

/// `config metadata ...`
#[derive(Debug, clap::Subcommand)]
pub enum Metadata {
    /// Show the metadata as YAML
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
    /// Change the metadata in an editor, or replace it by YAML on stdin
    Edit {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
}

/// `config template ...`
#[derive(Debug, clap::Subcommand)]
pub enum Template {
    /// List the templates of an instance
    #[command(visible_alias = "ls")]
    List {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
    },
    /// Print a template
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Template
        template: String,
    },
    /// Make a template: empty, or of what comes on stdin
    Create {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Template
        template: String,
    },
    /// Change a template in an editor, or replace it by what comes on stdin
    Edit {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Template
        template: String,
    },
    /// Delete a template
    #[command(visible_alias = "rm")]
    Delete {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Template
        template: String,
    },
}

fn url(instance: &str) -> Url {
    super::lifecycle::instance_url(instance).join("metadata")
}

impl Metadata {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let object = |name: String| Object { url: url(&name), kind: Kind::Instance, name, fields: FIELDS };
        match self {
            Self::Show { instance } => object(instance).show(context).await,
            Self::Edit { instance } => object(instance).edit(context).await,
        }
    }
}

impl Template {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::List { instance } => {
                let answer = context.client.get(&url(&instance).join("templates")).await;
                let names = answer.about(&context.client, Kind::Instance, &instance)?.metadata;
                for name in names.as_array().into_iter().flatten().filter_map(Value::as_str) {
                    output::line(name)?;
                }
                Ok(())
            }
            Self::Show { instance, template } => output::print(&read(context, &instance, &template).await?),
            Self::Create { instance, template } => {
                match read(context, &instance, &template).await {
                    Ok(_) => {
                        let text =
                            format!("{instance} has a template \"{template}\" already (edit changes it)");
                        return Err(Error::Local(text));
                    }
                    Err(Error::Api { status: 404, message }) if message.starts_with("Template") => {}
                    Err(other) => return Err(other),
                }
                let text = if editor::is_interactive() { String::new() } else { editor::from_stdin()? };
                write(context, &instance, &template, text).await
            }
            Self::Edit { instance, template } if !editor::is_interactive() => {
                write(context, &instance, &template, editor::from_stdin()?).await
            }
            Self::Edit { instance, template } => {
                let before = read(context, &instance, &template).await?;
                let mut text = before.clone();
                loop {
                    text = editor::edit(&text, ".tpl")?;
                    if text == before {
                        return Ok(());
                    }
                    match write(context, &instance, &template, text.clone()).await {
                        Ok(()) => return Ok(()),
                        Err(error @ Error::Unreachable(_)) => return Err(error),
                        Err(error) if editor::again(&error)? => {}
                        Err(_) => return Err(Error::Exit(1)),
                    }
                }
            }
            Self::Delete { instance, template } => {
                context.client.delete(&place(&instance, &template)).await.map(drop)
            }
        }
    }
}

fn place(instance: &str, template: &str) -> Url {
    url(instance).join("templates").with("path", template)
}

async fn read(context: &Context, instance: &str, template: &str) -> Result<String> {
    let url = place(instance, template);
    let response = context.client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
    let bytes = context.client.bytes(response).await?;
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::local("the template is not UTF-8"))
}

async fn write(context: &Context, instance: &str, template: &str, text: String) -> Result<()> {
    let mut headers = HeaderMap::new();
    let octets = hyper::header::HeaderValue::from_static("application/octet-stream");
    headers.insert(hyper::header::CONTENT_TYPE, octets);
    context.client.call(Method::POST, &place(instance, template), headers, full(text)).await.map(drop)
}
