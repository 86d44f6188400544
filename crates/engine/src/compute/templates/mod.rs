//! Templates of instances (ADR 42): what is kept of an image's metadata with an instance, and the files that are made of
//! it before a start.

mod parse;
mod render;

use crate::{Engine, EngineInner, InstanceView, Records, Row, context::Context};
use karst_model::{
    Config, Error, Result,
    access::Permission,
    device::Devices,
    instance::{Instance, InstanceKind},
    keys,
    spec::{GuestFile, GuestSpec},
    template::{InstanceMetadata, Templates, Trigger, check_name},
};
use std::sync::Arc;

/// Says which moment an instance has not seen a start since.
pub(crate) const PENDING: &str = "volatile.apply_template";
/// Bytes of all files of one start: they travel in the plan of a saga.
const MAX_RENDERED: usize = 48 << 10;
/// Where cloud-init's files are written by the platform itself, from the same keys.
const SEED: &str = "/var/lib/cloud/seed/nocloud";

/// What an instance has of its image's metadata.
pub(crate) fn metadata(records: &Records, instance: &Instance) -> InstanceMetadata {
    if let Some(kept) = &instance.metadata {
        return (**kept).clone();
    }
    let image = instance.image.and_then(|id| records.images.get(&id));
    let second = |t: Option<jiff::Timestamp>| t.map_or(0, |t| t.as_second());
    InstanceMetadata {
        architecture: instance.architecture.clone(),
        creation_date: second(image.and_then(|i| i.created_at).or(Some(instance.created_at))),
        expiry_date: second(image.and_then(|i| i.expires_at)),
        properties: instance
            .image_properties
            .iter()
            .filter_map(|(k, v)| Some((k.strip_prefix("image.")?.to_owned(), v.clone())))
            .collect(),
        templates: Templates::default(),
        version: 0,
    }
}

/// Gives an instance the templates of an image, or takes those it had; `trigger` waits for its next start.
pub(crate) fn take(instance: &mut Instance, records: &Records, templates: &Templates, trigger: Trigger) {
    instance.volatile.remove(PENDING);
    bring(instance, records, templates);
    defer(instance, trigger);
}

/// Gives an instance the templates that came with it.
pub(crate) fn bring(instance: &mut Instance, records: &Records, templates: &Templates) {
    instance.metadata = None;
    if !templates.is_empty() {
        let kept =
            InstanceMetadata { templates: templates.clone(), version: 1, ..metadata(records, instance) };
        instance.metadata = Some(Box::new(kept));
    }
}

/// Lets a moment wait for the next start. One that waits already stays: nothing was made since.
pub(crate) fn defer(instance: &mut Instance, trigger: Trigger) {
    let ruled = instance.metadata.as_ref().is_some_and(|m| !m.templates.rules.is_empty());
    if ruled && instance.kind == InstanceKind::Container {
        instance.volatile.entry(PENDING.into()).or_insert_with(|| trigger.as_str().into());
    }
}

/// The record of an instance after a start, when that is another one.
pub(crate) fn started(instance: &Instance) -> Option<Instance> {
    let mut after = instance.clone();
    after.volatile.remove(PENDING)?;
    Some(after)
}

/// The files that a start makes.
///
/// # Errors
/// Invalid, naming the template and its line.
fn files(instance: &Instance, config: &Config, devices: &Devices) -> Result<Vec<GuestFile>> {
    let Some(metadata) = instance.metadata.as_ref().filter(|_| instance.kind == InstanceKind::Container)
    else {
        return Ok(vec![]);
    };
    let pending = instance.volatile.get(PENDING).and_then(|t| Trigger::parse(PENDING, t).ok());
    let flag = |on: bool| if on { "true" } else { "false" }.to_owned();
    let about: Config = [
        ("name", instance.name.to_string()),
        ("type", instance.kind.as_str().to_owned()),
        ("architecture", instance.architecture.clone()),
        ("privileged", flag(keys::optional_flag(config, "security.privileged") == Some(true))),
        ("ephemeral", flag(instance.ephemeral)),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .into();
    let mut made: Vec<GuestFile> = vec![];
    let mut room = MAX_RENDERED;
    // What waits comes first; a path of both is then as the start says.
    for trigger in pending.into_iter().chain([Trigger::Start]) {
        for (path, rule) in metadata.templates.rules.iter().filter(|(_, r)| r.when.contains(&trigger)) {
            if path.starts_with(SEED) {
                continue;
            }
            let wrong = |what: String| {
                Error::invalid(
                    format!("templates.{path}"),
                    format!(
                        "{what}; change it by \"incus config template edit {} {}\"",
                        instance.name, rule.template
                    ),
                )
            };
            let template = metadata.templates.files.get(&rule.template);
            let template =
                template.ok_or_else(|| wrong(format!("the template {:?} is not there", rule.template)))?;
            let scope = render::Scope {
                trigger: trigger.as_str(),
                path,
                instance: &about,
                config,
                devices,
                properties: &rule.properties,
            };
            let content = render::render(template, &scope, room).map_err(|f| {
                wrong(format!("line {} of the template {:?}: {}", f.line, rule.template, f.what))
            })?;
            room -= content.len();
            made.push(GuestFile {
                path: path.clone(),
                content,
                create_only: rule.create_only,
                uid: rule.uid.unwrap_or(0),
                gid: rule.gid.unwrap_or(0),
                mode: rule.mode.unwrap_or(0o644),
            });
        }
    }
    Ok(made)
}

impl EngineInner {
    /// The specification of a start: with the files that it makes.
    ///
    /// # Errors
    /// As of a specification; invalid for a template that cannot be rendered.
    pub(crate) fn start_spec(
        &self,
        records: &Records,
        instance: &Instance,
        domain_id: u32,
    ) -> Result<GuestSpec> {
        let mut spec = self.guest_spec(records, instance, domain_id)?;
        let (config, devices) = records.expanded(instance);
        spec.files = files(instance, &config, &devices)?;
        Ok(spec)
    }
}

impl Engine {
    /// What is kept of the metadata of an instance's image with the instance, and the instance.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn instance_metadata(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<(Arc<InstanceView>, InstanceMetadata)> {
        let view = self.find(context, project, name, Permission::ProjectView)?;
        let found = metadata(&self.inner().inventory.read(), &view.instance);
        Ok((view, found))
    }

    /// Replaces what is kept, but for the texts of the templates; `if_version` is what was read.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, conflict (busy), forbidden.
    pub async fn instance_metadata_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: InstanceMetadata,
        if_version: Option<u64>,
    ) -> Result<()> {
        self.metadata_change(context, project, name, "instance-metadata-updated", move |kept| {
            if if_version.is_some_and(|v| v != kept.version) {
                return Err(Error::precondition_failed(
                    "the metadata has changed since it was read; read it again",
                ));
            }
            let files = std::mem::take(&mut kept.templates.files);
            *kept = InstanceMetadata { version: kept.version, ..new.clone() };
            kept.templates.files = files;
            Ok(())
        })
        .await
    }

    /// The text of a template.
    ///
    /// # Errors
    /// Invalid name, not found, forbidden.
    pub fn instance_template(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        template: &str,
    ) -> Result<String> {
        let (_, mut metadata) = self.instance_metadata(context, project, name)?;
        check_name("path", template)?;
        metadata.templates.files.remove(template).ok_or_else(|| missing(template))
    }

    /// Makes or replaces a template.
    ///
    /// # Errors
    /// Invalid (name, text, one that cannot be read as a template), not found, conflict (busy), forbidden.
    pub async fn instance_template_write(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        template: &str,
        text: &str,
    ) -> Result<()> {
        self.project(context, project, Permission::ResourceEdit)?;
        check_name("path", template)?;
        parse::parse(text)
            .map_err(|f| Error::invalid("body", format!("line {} of the template: {}", f.line, f.what)))?;
        self.metadata_change(context, project, name, "instance-metadata-template-created", |kept| {
            kept.templates.files.insert(template.to_owned(), text.to_owned());
            Ok(())
        })
        .await
    }

    /// Deletes a template. Rules that name it stay, and a start that needs it will say so.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (busy), forbidden.
    pub async fn instance_template_delete(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        template: &str,
    ) -> Result<()> {
        self.project(context, project, Permission::ResourceEdit)?;
        check_name("path", template)?;
        self.metadata_change(context, project, name, "instance-metadata-template-deleted", |kept| {
            kept.templates.files.remove(template).map(drop).ok_or_else(|| missing(template))
        })
        .await
    }

    async fn metadata_change(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        event: &'static str,
        mut change: impl FnMut(&mut InstanceMetadata) -> Result<()> + Send,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row: &Row<Instance> = records.instance(&project, name)?;
                tx.expect_unlocked(&super::lock(row.id));
                let mut kept = metadata(records, row);
                change(&mut kept)?;
                kept.check()?;
                kept.version += 1;
                let mut instance = row.value.clone();
                instance.metadata = Some(Box::new(kept));
                tx.replace(row, &instance);
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), event, super::path(&project.name, name));
        Ok(())
    }
}

fn missing(template: &str) -> Error {
    Error::not_found(format!("Template {template:?} not found"))
}
