//! Images that others may read: public ones, and one for whom a secret was made. Who is nobody here sees nothing else, and
//! learns of nothing else whether it exists.

use super::{CALL, FEATURE};
use crate::{
    Engine, Records, Row,
    context::Context,
    operations::{LiveOperation, NewOperation},
};
use karst_agent::{CallContext, ImageFile, WithFds};
use karst_model::{
    Error, ImageId, ProjectId, Result,
    access::Permission,
    image::{Image, ImageAlias},
    instance::InstanceKind,
    operation::OperationClass,
};
use std::{collections::BTreeMap, sync::Mutex, time::Duration};

/// How long a secret is good; long enough for a download to begin.
const GOOD: Duration = Duration::from_secs(900);
/// Most secrets at once.
const MOST: usize = 4096;

/// Secrets that were made: what each opens and until when, on the monotonic clock. They do not outlive the process.
pub(crate) type Secrets = Mutex<BTreeMap<String, (ImageId, Duration)>>;

impl Engine {
    /// Makes a secret by which somebody who is nobody here can read one image, for a quarter of an hour. It is answered to
    /// who asked and stands in no record: the operation names the image only.
    ///
    /// # Errors
    /// Not found, forbidden, quota.
    pub fn image_secret(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
    ) -> Result<(LiveOperation, String)> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        let image = inner.inventory.read().image(project.id, reference)?.clone();
        let now = inner.env.monotonic();
        let mut secret = [0u8; 32];
        inner.env.fill_random(&mut secret);
        let secret: String = secret.iter().map(|b| format!("{b:02x}")).collect();
        {
            let mut all = inner.image_secrets.lock().unwrap_or_else(|e| e.into_inner());
            all.retain(|_, (_, until)| *until > now);
            if all.len() >= MOST {
                return Err(Error::quota("too many secrets of images are in use; try again in a while"));
            }
            all.insert(secret.clone(), (image.id, now + GOOD));
        }
        let path = super::path(&image.fingerprint);
        let mut new = NewOperation::task("Image download token", Some(project.id), "images", path);
        new.class = OperationClass::Token;
        let live = inner.operations.begin(context, new);
        let told = [("fingerprint".to_owned(), image.fingerprint.clone().into())].into_iter().collect();
        inner.operations.end(&live, Ok(told));
        Ok((live, secret))
    }

    fn opened(&self, secret: Option<&str>) -> Option<ImageId> {
        let now = self.inner().env.monotonic();
        let all = self.inner().image_secrets.lock().unwrap_or_else(|e| e.into_inner());
        all.get(secret?).filter(|(_, until)| *until > now).map(|(image, _)| *image)
    }

    /// Where images of a project are, for one who is nobody; what is there is decided of each.
    fn public_home(&self, records: &Records, project: &str) -> Result<ProjectId> {
        let missing = |_| Error::not_found("image not found");
        Ok(records.home(records.project(project).map_err(missing)?, FEATURE))
    }

    /// An image for one who may see the project, or that is public, or that the secret opens.
    ///
    /// # Errors
    /// Not found.
    pub fn image_shown(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
        secret: Option<&str>,
    ) -> Result<Row<Image>> {
        let denied = match self.image(context, project, reference) {
            Ok(image) => return Ok(image),
            Err(e) if context.demand_known().is_ok() && secret.is_none() => return Err(e),
            Err(_) => Error::not_found(format!("image {reference:?} not found")),
        };
        let opened = self.opened(secret);
        let records = self.inner().inventory.read();
        let home = self.public_home(&records, project).map_err(|_| denied.clone())?;
        let image = records.image(home, reference).map_err(|_| denied.clone())?;
        if image.public || opened == Some(image.id) { Ok(image.clone()) } else { Err(denied) }
    }

    /// Opens the files of an image that is shown.
    ///
    /// # Errors
    /// Not found.
    pub async fn image_shown_export(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
        secret: Option<&str>,
    ) -> Result<(Row<Image>, WithFds<Vec<ImageFile>>)> {
        let image = self.image_shown(context, project, reference, secret)?;
        let inner = self.inner();
        let files = inner.agents.get(inner.node)?.image_export(&CallContext::read(CALL), image.id).await?;
        Ok((image, files))
    }

    /// The images of a project for anybody: all for one who may see it, else the public ones.
    ///
    /// # Errors
    /// Not found, forbidden, for somebody who is known.
    pub fn images_shown(&self, context: &Context, project: &str) -> Result<Vec<Row<Image>>> {
        if context.demand_known().is_ok() {
            return self.images(context, project);
        }
        let records = self.inner().inventory.read();
        let Ok(home) = self.public_home(&records, project) else { return Ok(vec![]) };
        let mut all: Vec<_> =
            records.images.values().filter(|i| i.project == home && i.public).cloned().collect();
        all.sort_by_key(|i| std::cmp::Reverse(i.uploaded_at));
        Ok(all)
    }

    /// Aliases for anybody: those of the images that are shown.
    ///
    /// # Errors
    /// As [`Engine::images_shown`].
    pub fn image_aliases_shown(
        &self,
        context: &Context,
        project: &str,
        image: Option<ImageId>,
    ) -> Result<Vec<Row<ImageAlias>>> {
        if context.demand_known().is_ok() {
            return self.image_aliases(context, project, image);
        }
        let records = self.inner().inventory.read();
        let Ok(home) = self.public_home(&records, project) else { return Ok(vec![]) };
        let public = |a: &&Row<ImageAlias>| {
            a.project == home
                && image.is_none_or(|i| i == a.image)
                && records.images.get(&a.image).is_some_and(|i| i.public)
        };
        Ok(records.aliases().filter(public).cloned().collect())
    }

    /// An alias for anybody.
    ///
    /// # Errors
    /// Not found.
    pub fn image_alias_shown(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        kind: Option<InstanceKind>,
    ) -> Result<Row<ImageAlias>> {
        if context.demand_known().is_ok() {
            return self.image_alias(context, project, name, kind);
        }
        let all = self.image_aliases_shown(context, project, None)?;
        let get = |n: &str| all.iter().find(|a| a.name == n && kind.is_none_or(|k| k == a.kind)).cloned();
        let machine = || get(&format!("{name}/vm")).filter(|_| kind == Some(InstanceKind::VirtualMachine));
        get(name).or_else(machine).ok_or_else(|| Error::not_found(format!("image alias {name:?} not found")))
    }
}
