//! `image`: lists, aliases, building; the bytes themselves are moved in `image_transfer`.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{
    completion::complete,
    create::is_fingerprint,
    image_alias::Alias,
    image_registry::Registry,
    image_server::{ImageAwait, ImageCopy, ImagePush, ImageRefresh},
    image_transfer::{export, import},
    object::Object,
};
use crate::{
    client::{About, Client, Kind, Url, operation::for_each},
    context::{Context, interruptible},
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units, yes_no,
    },
};

/// Fields of an image that PUT takes.
const FIELDS: &[&str] = &["auto_update", "expires_at", "profiles", "properties", "public"];

/// `image ...`
#[derive(Debug, clap::Subcommand)]
pub enum Image {
    /// List images
    #[command(visible_alias = "ls")]
    List {
        /// Beginning of an alias or fingerprint, words of the description, or PROPERTY=VALUE; all must hold
        filters: Vec<String>,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Show an image for people
    Info {
        /// Alias or fingerprint
        #[arg(add = complete(Kind::Image))]
        image: String,
    },
    /// Show an image as YAML
    Show {
        /// Alias or fingerprint
        #[arg(add = complete(Kind::Image))]
        image: String,
    },
    /// Change properties in an editor, or replace them by YAML on stdin
    Edit {
        /// Alias or fingerprint
        #[arg(add = complete(Kind::Image))]
        image: String,
    },
    /// Put an image into the store
    Import(Import),
    /// Copy an image of an image server into the store
    #[command(visible_alias = "cp")]
    Copy(ImageCopy),
    /// Let another server bring an image, and print the secret for it
    Await(ImageAwait),
    /// Bring an image to another server, which awaits it
    Push(ImagePush),
    /// Look for newer images at the servers that images came from
    Refresh(ImageRefresh),
    /// Write an image to files
    Export {
        /// Alias or fingerprint
        #[arg(add = complete(Kind::Image))]
        image: String,
        /// File or directory; default: its own name in this directory; "-" is stdout
        target: Option<PathBuf>,
    },
    /// Delete images
    #[command(visible_alias = "rm")]
    Delete {
        /// Aliases or fingerprints
        #[arg(required = true, add = complete(Kind::Image))]
        images: Vec<String>,
    },
    /// Build an image by a recipe on the server
    Build(Build),
    /// Names of images
    #[command(subcommand)]
    Alias(Alias),
    /// Registries of application containers that want a password
    #[command(subcommand)]
    Registry(Registry),
}

/// Options of `image import`.
#[derive(Debug, clap::Args)]
pub struct Import {
    /// An archive of both, or the metadata's archive, or a disk by itself (qcow2, raw, vmdk, ova), or an https URL
    pub source: String,
    /// The root file system or disk, when it is apart
    pub rootfs: Option<PathBuf>,
    /// Format of a disk by itself, where the name of the file does not say it: qcow2, raw, vmdk, ova
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// An alias (repeatable)
    #[arg(long, value_name = "NAME")]
    pub alias: Vec<String>,
    /// For everyone, also without a certificate
    #[arg(long)]
    pub public: bool,
    /// A property (repeatable)
    #[arg(long = "property", value_name = "KEY=VALUE")]
    pub properties: Vec<String>,
}

/// Options of `image build`.
#[derive(Debug, clap::Args)]
pub struct Build {
    /// Distribution and release: debian/12, debian/13, ubuntu/22.04, ubuntu/24.04
    recipe: String,
    /// For containers (the default)
    #[arg(long, conflicts_with = "vm")]
    container: bool,
    /// For virtual machines
    #[arg(long)]
    vm: bool,
    /// An alias (repeatable)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
}

impl Image {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { filters, format } => {
                let objects = client.get_as(&Url::new(&["images"]).with("recursion", 1)).await?;
                list(objects, &filters).print(format.format)
            }
            Self::Info { image } => {
                let fingerprint = resolve(client, &image).await?;
                let answer = object(&fingerprint, &image).get(context).await?;
                output::print(&info(&answer.metadata))
            }
            Self::Show { image } => object(&resolve(client, &image).await?, &image).show(context).await,
            Self::Edit { image } => object(&resolve(client, &image).await?, &image).edit(context).await,
            Self::Import(options) => import(context, options).await,
            Self::Copy(options) => options.run(context).await,
            Self::Await(options) => options.run(context).await,
            Self::Push(options) => options.run(context).await,
            Self::Refresh(options) => options.run(context).await,
            Self::Export { image, target } => {
                let fingerprint = resolve(client, &image).await?;
                interruptible(export(context, &fingerprint, target.as_deref())).await.about(
                    client,
                    Kind::Image,
                    &image,
                )
            }
            Self::Delete { images } => {
                for_each(&images, |image| async move {
                    let fingerprint = resolve(client, &image).await?;
                    object(&fingerprint, &image).delete(context).await
                })
                .await
            }
            Self::Build(options) => options.run(context).await,
            Self::Alias(command) => command.run(context).await,
            Self::Registry(command) => command.run(context).await,
        }
    }
}

impl Build {
    async fn run(self, context: &Context) -> Result<()> {
        let kind = if self.vm { "virtual-machine" } else { "container" };
        let body = json!({"recipe": self.recipe, "type": kind, "aliases": self.alias});
        let answer = context.client.post(&Url::new(&["karst", "images", "build"]), &body).await?;
        let operation = context.finish(answer, format!("building {} ({kind})", self.recipe)).await?;
        match operation.as_ref().and_then(|operation| operation.metadata.get("fingerprint")?.as_str()) {
            Some(fingerprint) => output::line(fingerprint),
            None => Ok(()),
        }
    }
}

/// An image as an object with fields.
fn object(fingerprint: &str, name: &str) -> Object {
    Object {
        url: Url::new(&["images", fingerprint]),
        kind: Kind::Image,
        name: name.to_owned(),
        fields: FIELDS,
    }
}

/// The fingerprint that an alias, or the beginning of a fingerprint, means.
pub async fn resolve(client: &Client, image: &str) -> Result<String> {
    if is_fingerprint(image) {
        return Ok(image.to_owned());
    }
    match client.get(&Url::new(&["images", "aliases", image])).await {
        Ok(answer) => Ok(member(&answer.metadata, "target")),
        // The server takes shorter beginnings too, if only one image has it.
        Err(error)
            if error.is_not_found() && !image.is_empty() && image.bytes().all(|b| b.is_ascii_hexdigit()) =>
        {
            Ok(image.to_owned())
        }
        Err(error) => Err::<String, Error>(error).about(client, Kind::Image, image),
    }
}

/// Filtered, in rows.
fn list(images: Vec<Value>, filters: &[String]) -> List {
    let kept: Vec<Value> =
        images.into_iter().filter(|image| filters.iter().all(|filter| holds(image, filter))).collect();
    let columns =
        &["ALIAS", "FINGERPRINT", "PUBLIC", "DESCRIPTION", "ARCHITECTURE", "TYPE", "SIZE", "UPLOAD DATE"];
    let mut list = List::of(columns, Value::Array(kept), |image| {
        let aliases = aliases(image);
        let alias = match aliases.as_slice() {
            [] => String::new(),
            [only] => only.clone(),
            [first, more @ ..] => format!("{first} ({} more)", more.len()),
        };
        vec![
            alias,
            units::short(&member(image, "fingerprint")).to_owned(),
            yes_no(image["public"].as_bool().unwrap_or_default()),
            member(&image["properties"], "description"),
            member(image, "architecture"),
            member(image, "type").to_uppercase(),
            units::known_bytes(image["size"].as_i64().unwrap_or_default()),
            units::time(&member(image, "uploaded_at")),
        ]
    });
    list.rows.sort();
    list
}

fn aliases(image: &Value) -> Vec<String> {
    image["aliases"].as_array().into_iter().flatten().map(|alias| member(alias, "name")).collect()
}

fn holds(image: &Value, filter: &str) -> bool {
    if let Some((key, value)) = filter.split_once('=') {
        let value = if key == "type" && value == "vm" { "virtual-machine" } else { value };
        return member(image, key) == value || member(&image["properties"], key) == value;
    }
    aliases(image).iter().any(|alias| alias.starts_with(filter))
        || member(image, "fingerprint").starts_with(filter)
        || member(&image["properties"], "description").to_lowercase().contains(&filter.to_lowercase())
}

/// One image for people.
fn info(image: &Value) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let mut field = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name}: {value}");
        }
    };
    field("Fingerprint", member(image, "fingerprint"));
    field("Size", units::known_bytes(image["size"].as_i64().unwrap_or_default()));
    field("Architecture", member(image, "architecture"));
    field("Type", member(image, "type"));
    field("Public", yes_no(image["public"].as_bool().unwrap_or_default()).to_lowercase());
    field("Cached", yes_no(image["cached"].as_bool().unwrap_or_default()).to_lowercase());
    field("Created", units::time(&member(image, "created_at")));
    field("Uploaded", units::time(&member(image, "uploaded_at")));
    field("Expires", units::time(&member(image, "expires_at")));
    field("Last used", units::time(&member(image, "last_used_at")));
    let mut section = |title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            let _ = writeln!(out, "{title}:");
            for line in lines {
                let _ = writeln!(out, "  {line}");
            }
        }
    };
    let properties = image["properties"].as_object().into_iter().flatten();
    section(
        "Properties",
        properties.map(|(key, value)| format!("{key}: {}", output::scalar(value))).collect(),
    );
    section("Aliases", aliases(image).into_iter().map(|alias| format!("- {alias}")).collect());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> Vec<Value> {
        vec![
            json!({"fingerprint": "f6452920a30df68a1c5e", "aliases": [{"name": "debian/12"}, {"name": "d"}], "public": false,
                   "architecture": "x86_64", "type": "container", "size": 73400320,
                   "properties": {"description": "Debian bookworm", "os": "debian"}}),
            json!({"fingerprint": "0123456789abcdef0123", "aliases": [], "public": true, "architecture": "x86_64",
                   "type": "virtual-machine", "size": 1073741824, "properties": null}),
        ]
    }

    fn csv(filters: &[&str]) -> String {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        list(images(), &filters).render("csv".parse().unwrap()).unwrap()
    }

    #[test]
    fn lists() {
        assert_eq!(
            csv(&[]),
            ",0123456789ab,YES,,x86_64,VIRTUAL-MACHINE,1.00GiB,\n\
             debian/12 (1 more),f6452920a30d,NO,Debian bookworm,x86_64,CONTAINER,70.00MiB,\n"
        );
        assert_eq!(csv(&["type=vm"]).lines().count(), 1);
        assert_eq!(csv(&["os=debian", "bookworm"]).lines().count(), 1);
        assert_eq!(csv(&["f645"]).lines().count(), 1);
        assert_eq!(csv(&["nope"]), "");
    }

    #[test]
    fn info_for_people() {
        insta::assert_snapshot!(info(&images()[0]));
    }
}
